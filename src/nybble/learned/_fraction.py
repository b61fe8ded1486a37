"""Where a weight lies between the two values of its grid around it, as AdaRound's variable."""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.learned._rectified import logits_of
from nybble.ops.grid import Grid
from nybble.qtensor import QuantParams
from nybble.quantizer import Quantizer

_BELOW = -1e-6  # a V that is just down


@torch.no_grad()
def fractions(quantizer: Quantizer, x: Tensor, params: QuantParams) -> tuple[Tensor, Tensor]:
    """V and gap: ``rectified(V)`` is the weight's fraction of the gap, in steps of w / s; beyond the range gap is 1.

    V >= 0 where the quantizer's own rounding goes up: so a tie begins as that says. Both float32, shape of ``x``.
    """
    granularity, shape = quantizer.granularity, tuple(x.shape)
    found: list[Tensor] = []

    def look(y: Tensor, grid: Grid) -> Tensor:
        lower, upper = grid.neighbours(y)
        found.extend((logits_between(y, grid, lower, upper), torch.where(lower == upper, 1.0, upper - lower)))
        return lower

    quantizer.soft(x.float(), params, look)
    v, gap = (granularity.from_blocks(blocks, shape) for blocks in found)
    return v, gap


@torch.no_grad()
def logits_between(y: Tensor, grid: Grid, lower: Tensor, upper: Tensor) -> Tensor:
    """:func:`fractions`' V for ``y`` = w / s between its neighbours on the grid; all float32 [blocks, elements]."""
    clipped = lower == upper
    gap = torch.where(clipped, 1.0, upper - lower)
    v = logits_of(torch.where(clipped, 0.0, (y - lower) / gap).clamp(0, 1))
    up = (grid.nearest(y) == upper) & ~clipped
    return torch.where(up, v.clamp(min=0), v.clamp(max=_BELOW))
