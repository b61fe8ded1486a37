"""Straight-through rounding whose clipping is decided after rounding, as ``torch.fake_quantize_*`` and OmniQuant do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nybble.ops.grid import Grid


@dataclass(frozen=True, eq=False)
class Reaching:
    """A :data:`nybble.ops.grid.Round`: the quantizer's own rounding; gradient 1 up to half a step beyond the range.

    Farther out it is 0.

    Attributes:
        shift: float32 [blocks, elements], added to y before rounding in steps of the grid; gets a gradient too.
    """

    shift: Tensor | None = None

    def __call__(self, y: Tensor, grid: Grid) -> Tensor:
        """Float32 [blocks, elements], x / scale, and the grid -> values of that shape."""
        if self.shift is not None:
            y = y + (self.shift if grid.table is None and grid.format.in_ones else self.shift * _gap(y, grid))
        found: Tensor = _Reaching.apply(y, grid.nearest(y), *reach(y, grid))  # type: ignore[no-untyped-call]
        return found


reaching = Reaching()


@torch.no_grad()
def _gap(y: Tensor, grid: Grid) -> Tensor:
    """The distance of the two values around each y; 1 beyond the range, where there is one only."""
    lower, upper = grid.neighbours(y)
    return torch.where(upper > lower, upper - lower, 1.0)


def reach(y: Tensor, grid: Grid) -> tuple[Tensor, Tensor] | tuple[float, float]:
    """Where that gradient ends, both included: two numbers, or float32 that broadcasts against ``y``."""
    if grid.table is None and grid.zero is None:
        return grid.format.reach
    if grid.zero is not None and grid.format.in_ones:
        zero = grid.zero.detach()
        return grid.format.min - zero - 0.5, grid.format.max - zero + 0.5
    low, high = (v.detach() if isinstance(v, Tensor) else y.new_full((), v) for v in (grid.low, grid.high))
    infinity = torch.full_like(high, torch.inf)
    first = grid.neighbours(torch.nextafter(low, infinity))[1] - low
    last = high - grid.neighbours(torch.nextafter(high, -infinity))[0]
    return low - first / 2, high + last / 2


class _Reaching(torch.autograd.Function):
    """``value`` forward; backward the gradient of y between two bounds. Nothing but y and the bounds is kept."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, value: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
        return value

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        y, _, low, high = inputs
        tensors = (low, high) if isinstance(low, Tensor) else ()
        ctx.ends = None if tensors else (low, high)
        ctx.save_for_backward(y, *tensors)
        ctx.save_for_forward(y, *tensors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return torch.where(_inside(ctx), gradient, 0.0), None, None, None

    @staticmethod
    def jvp(ctx: Any, moved: Tensor, *_: Any) -> Tensor:
        return torch.where(_inside(ctx), moved, 0.0)


def _inside(ctx: Any) -> Tensor:
    y, *ends = ctx.saved_tensors
    low, high = ends or ctx.ends
    found: Tensor = (y >= low) & (y <= high)
    return found
