"""A scale that was found before: calibrated, or read in a checkpoint (``k_scale`` and ``v_scale`` of a KV cache)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nybble.core.errors import UsageError
from nybble.formats import NumberFormat
from nybble.scales import BlockParams, ScaleRule

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Fixed(ScaleRule):
    """``value``: the scale of every block, whatever is in it; larger values saturate."""

    value: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.value) and self.value > 0):
            raise UsageError(f"fixed(value={self.value}): a scale is a positive number.")

    def fit(self, blocks: Tensor, fmt: NumberFormat, rounding: str, weight: Tensor | None = None) -> BlockParams:  # noqa: D102
        import torch

        largest = blocks.abs().amax(1, keepdim=True)
        scale = torch.full_like(largest, self.value)
        if not fmt.has_zero:  # a block of zeros stays one
            scale = torch.where(largest == 0, 0.0, scale)
        return BlockParams(torch.where(largest.isnan(), largest, scale))


PART = Fixed
