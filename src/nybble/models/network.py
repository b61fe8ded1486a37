"""A plain torch network over images as a transformers model, so that everything here can work on it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput


class NetworkConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Of a network whose structure is in its code."""

    model_type = "image_network"


class Network(PreTrainedModel):  # type: ignore[no-untyped-call]
    """``net`` with the call that models of images have; in memory only, as no folder says how to build ``net``.

    Args:
        config: anything; the network's structure is not in it.
        net: images [n, channels, height, width] -> logits [n, classes].
    """

    config_class = NetworkConfig
    main_input_name = "pixel_values"

    def __init__(self, config: NetworkConfig, net: nn.Module) -> None:
        super().__init__(config)
        self.net = net

    def forward(self, pixel_values: Tensor, **_: Any) -> ImageClassifierOutput:
        """Images as the network wants them -> logits."""
        return ImageClassifierOutput(logits=self.net(pixel_values))


def as_model(net: nn.Module) -> Network:
    """Wrap a network; its modules stay its own, in the modes that they have."""
    config = NetworkConfig()
    config.name_or_path = type(net).__name__
    found = Network(config, net)
    found.training = net.training
    return found
