"""BERT whose layers have widths of their own: a linear layer reduces what enters one, another expands what leaves it.

SuperShaper's network (Ganesan et al. 2021, arXiv:2110.04711), which Mixture-of-Supernets searches for encoders. Both
linears begin as identities, so at full width it is BERT: :func:`of_bert` makes it of one, bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM


class BottleneckConfig(BertConfig):  # type: ignore[no-untyped-call]
    """BERT's, and ``widths``: of each layer, whole numbers that the heads divide; none: ``hidden_size``."""

    model_type = "nybble-bottleneck"

    def __init__(self, widths: Sequence[int] | None = None, **more: Any) -> None:
        super().__init__(**more)
        self.widths = [self.hidden_size] * self.num_hidden_layers if widths is None else list(widths)
        heads = self.num_attention_heads
        if len(self.widths) != self.num_hidden_layers or any(width < 1 or width % heads for width in self.widths):
            raise ValueError(
                f"widths {self.widths}: one for each of {self.num_hidden_layers} layers, a multiple of {heads} heads."
            )


class Bottleneck(nn.Module):
    """A layer of BERT between two linears."""

    def __init__(self, config: BottleneckConfig, like: Any, place: int) -> None:
        super().__init__()
        wide, width = config.hidden_size, config.widths[place]
        own = copy.deepcopy(config)
        own.hidden_size = width
        self.reduce, self.layer = nn.Linear(wide, width), like(own, layer_idx=place)
        self.expand = nn.Linear(width, wide)
        for module in self.layer.modules():
            if getattr(module, "config", None) is own:
                module.config = config  # sizes are read by now; which attention runs is said there later

    def forward(self, hidden_states: Tensor, *given: Any, **more: Any) -> Any:
        """[n, tokens, wide] -> the same; the rest is the layer's."""
        found = self.layer(self.reduce(hidden_states), *given, **more)
        if isinstance(found, tuple):  # of older transformers
            return self.expand(found[0]), *found[1:]
        return self.expand(found)


class BottleneckForMaskedLM(BertForMaskedLM):
    """See the module."""

    config_class = BottleneckConfig

    def __init__(self, config: BottleneckConfig) -> None:
        super().__init__(config)
        layers: Any = self.bert.encoder.layer
        self.bert.encoder.layer = nn.ModuleList(
            Bottleneck(config, type(layer), place) for place, layer in enumerate(layers)
        )
        self.post_init()  # type: ignore[no-untyped-call]
        layers = self.bert.encoder.layer
        for layer in layers:
            for linear in (layer.reduce, layer.expand):
                nn.init.eye_(linear.weight)


def of_bert(model: Any) -> Any:
    """A network of bottlenecks at full width with the weights of a ``BertForMaskedLM``, which it computes as."""
    given = model.config.to_dict()
    for name in ("model_type", "architectures"):
        given.pop(name, None)
    made: Any = BottleneckForMaskedLM(BottleneckConfig(**given))
    own: dict[str, Tensor] = made.state_dict()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            head, layer, rest = name.partition(".encoder.layer.")
            place, _, inside = rest.partition(".")
            own[f"{head}{layer}{place}.layer.{inside}" if layer else name].copy_(tensor)
    return made.train(model.training).to(model.device)


PART = BottleneckForMaskedLM
