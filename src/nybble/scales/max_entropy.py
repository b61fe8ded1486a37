"""Codes equally likely, if the values were uniform: statistics say how wide the range is, levels how it is cut.

Uniform values of mean magnitude m fill -2m .. 2m. The scale spreads the cells of the format over just that, half a step
beyond its ends too, so that a format of n evenly spaced levels gives each 1/n of the elements:

    scale = 4 mean|x| / (n step)            without negative values, 0 .. 2m:  2 mean|x| / (largest value + step / 2)

Ternary: 4/3 mean|x|; binary: mean|x|; both of Liu et al. 2023, "Binary and Ternary Natural Language Generation",
arXiv:2306.01841. ``midriseK``: the step of StatsQ, 2 mean|x| / 2**(K - 1) (OFQ, Liu et al. 2023, arXiv:2302.02210;
LLM-QAT at 2 bits, arXiv:2305.17888). Of grids that aren't even the steps at the ends count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nybble.formats import NumberFormat
from nybble.scales import BlockParams, ScaleRule
from nybble.scales.mean import mean_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class MaxEntropy(ScaleRule):
    """Of the weighted mean of the magnitudes."""

    def fit(self, blocks: Tensor, fmt: NumberFormat, rounding: str, weight: Tensor | None = None) -> BlockParams:  # noqa: D102
        mean = mean_of(blocks.double().abs(), None if weight is None else weight.double().expand_as(blocks))
        grid = fmt.grid
        low, high = 1.5 * grid[0] - 0.5 * grid[1], 1.5 * grid[-1] - 0.5 * grid[-2]
        return BlockParams((mean * (4 / (high - low) if fmt.signed else 2 / high)).float())


PART = MaxEntropy
