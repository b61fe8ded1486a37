"""Straight-through rounding whose clipping is decided after rounding, as ``torch.fake_quantize_*`` and OmniQuant do."""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.ops.grid import Grid, straight_through


def reaching(y: Tensor, grid: Grid) -> Tensor:
    """The quantizer's own rounding; gradient 1 up to half a step beyond the ends of the range, 0 farther out."""
    return straight_through(grid.nearest(y), torch.clamp(y, *reach(y, grid)))


def reach(y: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Where that gradient ends: float32, broadcasting against ``y``."""
    low, high = (v.detach() if isinstance(v, Tensor) else y.new_full((), v) for v in (grid.low, grid.high))
    infinity = torch.full_like(high, torch.inf)
    first = grid.neighbours(torch.nextafter(low, infinity))[1] - low
    last = high - grid.neighbours(torch.nextafter(high, -infinity))[0]
    return low - first / 2, high + last / 2
