"""Soft masks in a ViT, learned with its weights: over the features of heads, the units of MLPs, and patches.

    attention  z_a, of 1; q, k and v of a head have one mask:   q <- q z_a, k <- k z_a, v <- v z_a
    mlp        z_m, of 1; behind the activation:                u <- GELU(fc1 x) z_m
    tokens     z_p, of 3; on the normed inputs of both:         x <- norm(x) tanh(z_p); the class token has none

They come behind biases, so a mask of 0 takes those too. Chavan et al. 2022, arXiv:2201.00814.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nybble.core.errors import SchemeError
from nybble.core.shapes import Float
from nybble.training.objective import Objective

KINDS = ("attention", "mlp", "tokens")
Heads = Literal["feature", "head", "layer"]
OPEN = 3.0
"""Where masks of patches begin; tanh makes 0.995 of it."""


class Mask(nn.Module):
    """One mask, soft until it is fixed.

    Args:
        shape: of what learns. full: that it is spread over. begin: its value.
        bounded: by tanh.
    """

    fixed: Tensor | None

    def __init__(self, shape: tuple[int, ...], full: tuple[int, ...], begin: float, bounded: bool = False) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.full(shape, begin))
        self.full, self.bounded = full, bounded
        self.register_buffer("fixed", None)

    def fix(self, kept: Tensor) -> None:
        """Become 0 and 1, and learn no more.

        Raises:
            SchemeError: the mask is of another shape.
        """
        if tuple(kept.shape) != self.full:
            raise SchemeError(f"a mask of {list(kept.shape)} is given for {list(self.full)} units.")
        self.fixed = kept.to(self.z.device, self.z.dtype)
        self.z.requires_grad_(False)

    def soft(self) -> Tensor:
        """What learns, as it multiplies."""
        return torch.tanh(self.z) if self.bounded else self.z

    def forward(self) -> Tensor:
        """Factors, flat."""
        factors: Tensor = self.soft().expand(self.full) if self.fixed is None else self.fixed
        return factors.flatten()


class Behind(nn.Module):
    """A layer, and a mask on what it gives."""

    def __init__(self, layer: nn.Module, mask: Mask) -> None:
        super().__init__()
        self.layer, self.mask = layer, mask

    def forward(self, x: Tensor) -> Tensor:
        """[..., features]."""
        y: Tensor = self.layer(x)
        factors: Tensor = self.mask()
        return y * factors.to(y.dtype)


class Before(Behind):
    """A layer, and a mask on what it gets."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., units]."""
        y: Tensor = self.layer(x * self.mask().to(x.dtype))
        return y


class OnTokens(Behind):
    """A norm, and a mask on the tokens behind the first."""

    def forward(self, x: Tensor) -> Tensor:
        """[n, tokens, channels]."""
        y: Tensor = self.layer(x)
        factors = torch.cat([self.mask.z.new_ones(1), self.mask()])
        return y * factors.to(y.dtype)[:, None]


class Masks:
    """Masks put into a model, by kind and layer.

    Args:
        model: a ViTForImageClassification; changed in place.
        kinds: which of :data:`KINDS`.
        heads: one mask a feature of each head, a head, or a feature of all heads of a layer.
    """

    def __init__(self, model: Any, kinds: tuple[str, ...] = KINDS, heads: Heads = "feature") -> None:
        config = model.config
        number, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        learned = {"feature": (number, size), "head": (number, 1), "layer": (1, size)}[heads]
        patches = (model.vit.embeddings.patch_embeddings.num_patches,)
        device = next(model.parameters()).device
        self.by_kind: dict[str, list[Mask]] = {kind: [] for kind in kinds}
        for layer in model.vit.layers:
            if "attention" in kinds:
                mask = self._new("attention", Mask(learned, (number, size), 1.0), device)
                for name in ("q_proj", "k_proj", "v_proj"):
                    setattr(layer.attention, name, Behind(getattr(layer.attention, name), mask))
            if "mlp" in kinds:
                units = (layer.mlp.fc1.out_features,)
                layer.mlp.fc2 = Before(layer.mlp.fc2, self._new("mlp", Mask(units, units, 1.0), device))
            if "tokens" in kinds:
                mask = self._new("tokens", Mask(patches, patches, OPEN, bounded=True), device)
                for name in ("layernorm_before", "layernorm_after"):
                    setattr(layer, name, OnTokens(getattr(layer, name), mask))

    def _new(self, kind: str, mask: Mask, device: torch.device) -> Mask:
        self.by_kind[kind].append(mask.to(device))
        return mask

    def parameters(self) -> list[nn.Parameter]:
        """What learns, each once."""
        return [mask.z for masks in self.by_kind.values() for mask in masks]

    def penalty(self, weights: Mapping[str, float]) -> Float[Tensor, ""]:
        """The weighted sums of absolute masks, over all layers and elements: no means."""
        found = [weights[kind] * mask.soft().abs().sum() for kind, masks in self.by_kind.items() for mask in masks]
        return torch.stack(found).sum()

    def scores(self, kind: str) -> list[Tensor]:
        """By layer, what is thresholded: the masks, with their sign."""
        return [mask.z.detach().double().cpu() for mask in self.by_kind[kind]]

    def fix(self, kept: Mapping[str, list[Tensor]]) -> None:
        """Make all of them 0 and 1."""
        for kind, masks in self.by_kind.items():
            for mask, each in zip(masks, kept[kind], strict=True):
                mask.fix(each)


class Sparse(Objective):
    """An objective, and the penalty of masks.

    Args:
        objective: what the network is told else. masks: in the model. weights: by kind.
    """

    def __init__(self, objective: Objective, masks: Masks, weights: Mapping[str, float]) -> None:
        super().__init__(objective.task, objective.losses, objective.teacher)
        self.masks, self.weights = masks, weights

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], progress: float) -> Tensor:  # noqa: D102
        return super().__call__(model, batch, progress) + self.masks.penalty(self.weights)
