"""A plain torch network as a transformers model, so that everything here can work on it."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from nybble.nn.kinds import kind_of


class NetworkConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Of a network whose structure is in its code."""

    model_type = "plain_network"


class Network(PreTrainedModel):  # type: ignore[no-untyped-call]
    """``net`` with the call that models of transformers have; in memory only, as no folder says how to build ``net``.

    Args:
        config: anything; the network's structure is not in it.
        net: called with tensors that have samples in front; what it gives is taken for logits.
    """

    config_class = NetworkConfig
    main_input_name = "pixel_values"

    def __init__(self, config: NetworkConfig, net: nn.Module) -> None:
        super().__init__(config)
        self.alone = kind_of(net) is not None
        self.net = nn.Sequential(net) if self.alone else net

    @property
    def network(self) -> nn.Module:
        """What was wrapped, as it is now."""
        return self.net.get_submodule("0") if self.alone else self.net

    def forward(self, **inputs: Any) -> ImageClassifierOutput:
        """Inputs by the network's own names; one of another name goes where its first does."""
        first = next(iter(inspect.signature(self.net.forward).parameters), "")
        main = inputs.pop(first if first in inputs else next(iter(inputs)))
        return ImageClassifierOutput(logits=self.net(main, **inputs))


def as_model(net: nn.Module) -> Network:
    """Wrap a network; its modules stay its own, in the modes that they have."""
    config = NetworkConfig()
    config.name_or_path = type(net).__name__
    found = Network(config, net)
    found.training = net.training
    return found
