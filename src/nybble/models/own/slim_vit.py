"""Vision transformers whose heads, MLPs and token sets have sizes of their own in each layer.

What ``nybble search --method vit-slim`` finds (Chavan et al. 2022, arXiv:2201.00814): transformers' ViT with fewer rows
in its projections, and with layers that let go of tokens. The scale of the softmax stays that of the full heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit.modeling_vit import ViTAttention, ViTLayer, eager_attention_forward


class SlimViTConfig(ViTConfig):  # type: ignore[no-untyped-call]
    """Of a ViT; sizes of the full one where a list is None.

    Attributes:
        head_features: by layer and head, how many features of q, k and v there are; a head may have none.
        mlp_units: by layer. patches: by layer, which patches it works on, rising; each layer's are of the one before.
    """

    model_type = "nybble-slim-vit"
    head_features: list[list[int]] | None = None
    mlp_units: list[int] | None = None
    patches: list[list[int]] | None = None


class Index:
    """Numbers as a tensor, made once for each device; no buffer, as loaders fill these each in their own way."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers, self._made = list(numbers), dict[torch.device, Tensor]()

    def on(self, device: torch.device) -> Tensor:
        """int64 [numbers]."""
        if torch.compiler.is_compiling():  # what is made then stands for a tensor
            return torch.tensor(self.numbers, device=device)
        if device not in self._made:
            with torch.inference_mode(False):  # training may follow
                self._made[device] = torch.tensor(self.numbers, device=device)
        return self._made[device]


class RaggedAttention(ViTAttention):
    """Heads of several sizes; in the products all are as wide as the widest, the rest is zeros."""

    def __init__(self, config: SlimViTConfig, sizes: Sequence[int]) -> None:
        super().__init__(config)
        self.sizes = [size for size in sizes if size]
        if not self.sizes:
            raise ValueError("a layer's attention has no features; at least one head needs one.")
        width, bias = sum(self.sizes), config.qkv_bias
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(config.hidden_size, width, bias=bias) for _ in range(3))
        self.o_proj = nn.Linear(width, config.hidden_size)
        self.ragged = len({*self.sizes}) > 1
        self.spread, self.gathered = (Index(places) for places in _places(self.sizes))

    def _heads(self, x: Tensor) -> Tensor:
        """[n, tokens, features] -> [n, heads, tokens, features of the widest]."""
        if self.ragged:
            x = functional.pad(x, (0, 1)).index_select(-1, self.spread.on(x.device))
        return x.view(*x.shape[:-1], len(self.sizes), max(self.sizes)).transpose(1, 2)

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As of the full attention."""
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        operands = [self._heads(project(hidden_states)) for project in (self.q_proj, self.k_proj, self.v_proj)]
        dropout = self.attention_dropout if self.training else 0.0
        found, weights = attend(self, *operands, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        found = found.flatten(2)
        if self.ragged:
            found = found.index_select(-1, self.gathered.on(found.device))
        return self.o_proj(found), weights


def _places(sizes: Sequence[int]) -> tuple[list[int], list[int]]:
    """Which feature each place of padded heads has (one behind the last is a zero), and where features are in them.

    >>> _places([2, 1])
    ([0, 1, 2, 3], [0, 1, 2])
    """
    width, total, begin = max(sizes), sum(sizes), 0
    spread, gathered = list[int](), list[int]()
    for head, size in enumerate(sizes):
        spread += [*range(begin, begin + size), *[total] * (width - size)]
        gathered += range(head * width, head * width + size)
        begin += size
    return spread, gathered


class SlimLayer(ViTLayer):  # type: ignore[no-untyped-call]
    """One with its own sizes, which lets go of tokens before it does anything.

    Args:
        config: of the network. number: of the layer.
    """

    def __init__(self, config: SlimViTConfig, number: int) -> None:
        super().__init__(config)
        if config.head_features is not None:
            self.attention = RaggedAttention(config, config.head_features[number])
        if config.mlp_units is not None:
            self.mlp.fc1 = nn.Linear(config.hidden_size, config.mlp_units[number])
            self.mlp.fc2 = nn.Linear(config.mlp_units[number], config.hidden_size)
        kept = _kept(config, number)
        self.kept = None if kept is None else Index(kept)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """[n, tokens of the layer before, channels] -> [n, tokens, channels]."""
        if self.kept is not None:
            hidden_states = hidden_states.index_select(1, self.kept.on(hidden_states.device))
        found: Tensor = super().forward(hidden_states, attention_mask, **kwargs)
        return found


def _kept(config: SlimViTConfig, number: int) -> list[int] | None:
    """Places of a layer's tokens among those of the layer before, the class token first; None where all stay."""
    if config.patches is None:
        return None
    every = list(range((config.image_size // config.patch_size) ** 2))  # type: ignore[operator]
    before, mine = config.patches[number - 1] if number else every, config.patches[number]
    if not {*mine} <= {*before}:
        raise ValueError(f"layer {number} works on patches that the one before has let go of.")
    return None if mine == before else [0, *(1 + before.index(patch) for patch in mine)]


class SlimViTForImageClassification(ViTForImageClassification):  # type: ignore[no-untyped-call]
    """See the module."""

    config_class = SlimViTConfig

    def __init__(self, config: SlimViTConfig) -> None:
        super().__init__(config)
        for name in ("head_features", "mlp_units", "patches"):
            found = getattr(config, name)
            if found is not None and len(found) != config.num_hidden_layers:
                raise ValueError(f"{name} has {len(found)} entries for {config.num_hidden_layers} layers.")
        self.vit.layers = nn.ModuleList(SlimLayer(config, number) for number in range(config.num_hidden_layers))


PART = SlimViTForImageClassification
