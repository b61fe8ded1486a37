"""``rank1``: one factor for each index of each dimension, of which an element takes the smallest.

The second moments of 4-bit optimizer states: Li et al. 2023, arXiv:2309.01507, section 4.2 (rank-1 normalization).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from nybble.core.arithmetic import divided
from nybble.granularity import Grid
from nybble.granularity._cut import Runs, need_dims

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Rank1(Runs):
    """One factor for each index of each dimension; scale = min over dimensions of the slice maxima.

    To the blocks the whole tensor is one.
    """

    word: ClassVar[str] = "rank1"
    example: ClassVar[str] = "rank1"
    combine: ClassVar[str] = "min"
    factors_are: ClassVar[str] = "slice maxima"

    def leading(self, shape: Sequence[int]) -> int:  # noqa: D102
        need_dims(self, shape, 1)
        return 0

    def fit_factors(self, x: Tensor, fmt: Grid, fraction: Tensor | None = None) -> tuple[Tensor, ...]:
        """Slice maxima over each dimension; a zero slice gets 1, or stays 0 where the format has no zero."""
        import torch

        magnitude = divided(x.abs(), fmt.absmax)
        factors = []
        for dim in range(x.dim()):
            others = [d for d in range(x.dim()) if d != dim]
            top = magnitude.amax(others, keepdim=True) if others else magnitude.amax(keepdim=True).reshape(1)
            factors.append(torch.where(top == 0, torch.ones_like(top), top) if fmt.has_zero else top)
        return tuple(factors)


PART = Rank1
