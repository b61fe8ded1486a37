"""``scale = mean|x|``: least squares for binary codes, and b1.58's rule for ternary ones.

Rastegari et al. 2016, arXiv:1603.05279; Ma et al. 2024, arXiv:2402.17764. With ``offset=true`` a block's mean is kept
in the units of x, and what is rounded is x less that mean: ``x_hat = mean|x - m| sign(x - m) + m``, for binary codes
least squares again (XNOR with a mean, as in IR-Net; PTQ1.61, arXiv:2502.13179, begins with mean|x| instead). With
``least=0.5`` of {0, s} too: the mean of what rounds to 1 (BiT, Liu et al. 2022, arXiv:2205.13016). ``above=0.7`` is
the scale of ternary weight networks, that of what they don't make 0 (Li et al. 2016, arXiv:1605.04711, eq. 3-6).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nybble.core.errors import UsageError
from nybble.formats import NumberFormat
from nybble.scales import BlockParams, ScaleRule

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Mean(ScaleRule):
    """Weighted mean of the magnitudes.

    Attributes:
        offset: keep the block's mean, and round what is left.
        least: of magnitudes of at least this, in the units of x, alone; where a block has none, it counts as zeros.
        above: of magnitudes above so many times their mean alone.
    """

    offset: bool = False
    least: float = 0.0
    above: float = 0.0

    def __post_init__(self) -> None:
        if not min(self.least, self.above) >= 0 or bool(self.least) + bool(self.above) + self.offset > 1:
            raise UsageError(f"{self}: least and above are magnitudes, 0 or more; one of offset, least and above goes.")

    @property
    def has_offset(self) -> bool:  # noqa: D102
        return self.offset

    def fit(self, blocks: Tensor, fmt: NumberFormat, rounding: str, weight: Tensor | None = None) -> BlockParams:  # noqa: D102
        wide = blocks.double()  # sums of float32 could overflow
        weight = None if weight is None else weight.double().expand_as(blocks)
        if self.least or self.above:
            size = wide.abs()
            left_out = size < self.least if self.least else size <= self.above * mean_of(size, weight)  # never NaN
            weight = (~left_out).double() if weight is None else weight * ~left_out
        if not self.offset:
            return BlockParams(mean_of(wide.abs(), weight).float())
        centre = mean_of(wide, weight).float()
        return BlockParams(mean_of((wide - centre.double()).abs(), weight).float(), offset=centre)


def mean_of(values: Tensor, weight: Tensor | None) -> Tensor:
    """Of each block, float64 [blocks, 1]; 0 where nothing counts."""
    import torch

    if weight is None:
        return values.mean(1, keepdim=True)
    total = weight.sum(1, keepdim=True)
    return (values * weight).sum(1, keepdim=True) / torch.where(total == 0, 1.0, total)


PART = Mean
