"""``scale = mean|x|``: least squares for binary codes, and b1.58's rule for ternary ones.

Rastegari et al. 2016, arXiv:1603.05279; Ma et al. 2024, arXiv:2402.17764.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nybble.formats import NumberFormat
from nybble.scales import BlockParams, ScaleRule

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Mean(ScaleRule):
    """Weighted mean of the magnitudes."""

    def fit(self, blocks: Tensor, fmt: NumberFormat, rounding: str, weight: Tensor | None = None) -> BlockParams:  # noqa: D102
        import torch

        magnitude = blocks.abs().double()  # sums of float32 could overflow
        if weight is None:
            return BlockParams(magnitude.mean(1, keepdim=True).float())
        weight = weight.double().expand_as(blocks)
        total = weight.sum(1, keepdim=True)
        mean = (magnitude * weight).sum(1, keepdim=True) / torch.where(total == 0, 1.0, total)
        return BlockParams(mean.float())


PART = Mean
