"""As absmax, of values that are clamped first: an outlier beyond the limit saturates instead of stretching the grid.

    scale = min(max|x|, limit) / (largest value)

The dynamic 8-bit activations that ternary and binary weights go with, ``int8 tensor scale=clamped``: Liu et al. 2023,
arXiv:2306.01841 (clamped at 2.5, one scale a tensor). Its gradient ends there too: ``ste`` with ``mask: 2.5``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nybble.core.arithmetic import divided
from nybble.core.errors import UsageError
from nybble.formats import NumberFormat
from nybble.scales import BlockParams, ScaleRule

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Clamped(ScaleRule):
    """``limit``: in the units of x."""

    limit: float = 2.5

    def __post_init__(self) -> None:
        if not (math.isfinite(self.limit) and self.limit > 0):
            raise UsageError(f"clamped(limit={self.limit}): the limit is a positive number.")

    def fit(self, blocks: Tensor, fmt: NumberFormat, rounding: str, weight: Tensor | None = None) -> BlockParams:  # noqa: D102
        return BlockParams(divided(blocks.abs().amax(1, keepdim=True).clamp(max=self.limit), fmt.absmax))


PART = Clamped
