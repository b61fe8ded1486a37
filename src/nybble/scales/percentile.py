"""A high percentile of the magnitudes instead of the largest, so that a few outliers clip (activations: 99.999 %)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nybble.core.arithmetic import divided
from nybble.core.errors import UsageError
from nybble.formats import NumberFormat
from nybble.scales import BlockParams, ScaleRule

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Percentile(ScaleRule):
    """``p``: percent of the magnitudes at or below the clip value, linearly interpolated; 100 is absmax."""

    p: float = 99.9

    def __post_init__(self) -> None:
        if not 0 < self.p <= 100:
            raise UsageError(f"percentile(p={self.p}): p is above 0 and at most 100.")

    def fit(self, blocks: Tensor, fmt: NumberFormat, rounding: str, weight: Tensor | None = None) -> BlockParams:  # noqa: D102
        import torch

        magnitude = blocks.abs()
        if weight is None:
            count = torch.full((blocks.shape[0], 1), blocks.shape[1], device=blocks.device)
        else:  # padding sorts to the front and is skipped
            real = (weight > 0).expand_as(blocks)
            magnitude, count = torch.where(real, magnitude, -1.0), real.sum(1, keepdim=True)
        ordered = magnitude.sort(1).values
        # A NaN sorts last and would hide at a percentile below 100: it must reach the scale.
        poison = magnitude.amax(1, keepdim=True) * 0
        position = (blocks.shape[1] - count) + (count - 1).double() * (self.p / 100)
        below = position.floor().long().clamp(0, blocks.shape[1] - 1)
        above = position.ceil().long().clamp(0, blocks.shape[1] - 1)
        low, high = ordered.gather(1, below), ordered.gather(1, above)
        return BlockParams(divided(low + (high - low) * (position - below).float(), fmt.absmax) + poison)


PART = Percentile
