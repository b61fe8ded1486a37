"""``scale = mean|x|``: least squares for binary codes (Rastegari et al. 2016), and b1.58's rule for ternary ones (Ma et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nybble.formats import NumberFormat
from nybble.scales import BlockParams, ScaleRule


@dataclass(frozen=True)
class Mean(ScaleRule):
    """Weighted mean of the magnitudes."""

    def fit(self, blocks: Tensor, fmt: NumberFormat, rounding: str, weight: Tensor | None = None) -> BlockParams:  # noqa: D102
        if weight is None:
            return BlockParams(blocks.abs().mean(1, keepdim=True))
        weight = weight.to(blocks.dtype).expand_as(blocks)
        total = weight.sum(1, keepdim=True)
        return BlockParams((blocks.abs() * weight).sum(1, keepdim=True) / total.clamp(min=1e-38))


PART = Mean
