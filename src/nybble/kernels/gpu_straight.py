# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""GPU versions of rounding by given scales, forward and backward, in Triton: one pass over memory each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.formats import get_format
from nybble.kernels._gpu import Launches, Told, traits
from nybble.kernels._gpu_blocks import EXACT, LONGEST, Cut, cut, divided, divisor, on, steps
from nybble.kernels._gpu_grids import Way, halves, on_grid, rank, way, whole, within
from nybble.ops import blocks as block_ops
from nybble.ops import straight
from nybble.ops.rounding import grid_table
from nybble.rounding import get_rounding

_launches = Launches()


@triton.jit
def _reciprocal(scale):
    """:func:`nybble.ops.blocks.safe_reciprocal`."""
    found = divided(tl.full(scale.shape, 1.0, tl.float32), divisor(scale))
    held = within(found, -3.4028234663852886e38, 3.4028234663852886e38)
    return tl.where(found != found, found, held)


@triton.jit
def _around_zero(y, zero, low, high, INSIDE: tl.constexpr):
    """``round_to_codes(y, zero) - zero``, ties to even; what is far beyond the codes is held first."""
    if INSIDE:
        moved = y + zero
        found = whole(within(moved, low, high))
    else:
        moved = y + zero
        found = within(whole(within(y, -1048576.0, 1048576.0)) + zero, low, high)
    return tl.where(moved != moved, moved, found) - zero


@triton.jit
def _gap(y, grid, COUNT: tl.constexpr, HALVES: tl.constexpr):
    """The distance of the grid's values around y; 1 beyond the range."""
    above = rank(y, grid, COUNT + 1, HALVES)
    lower = tl.load(grid + tl.maximum(above - 1, 0))
    upper = tl.load(grid + tl.minimum(above, COUNT - 1))
    found = tl.where(upper > lower, upper - lower, 1.0)
    return tl.where(y != y, 1.0, found)


@triton.jit
def _scaled(
    x, scales, zeros, shifts, grid, out, thresholds, values, blocks, elements, tiles, row_step, step, low, high,
    GRID: tl.constexpr, HOW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """HOW: reciprocal, zero points, added before rounding, shifted, by gaps, steps to a gap."""
    block = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % tiles) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (block < blocks) & (column < elements)
    v = tl.load(x + block * elements + column, mask=inside, other=0.0).to(tl.float32)
    if HOW[6]:  # a scale for each element
        scale = tl.load(scales + block * row_step + column * step, mask=inside, other=1.0)
    else:
        scale = tl.load(scales + block * row_step, mask=block < blocks, other=1.0)
    if HOW[0]:
        y = v * _reciprocal(scale)
    else:
        y = divided(v, divisor(scale))
    if HOW[3]:
        y = _moved(y, shifts, block, column, inside, elements, grid, GRID, HOW)[0]
    if HOW[1]:
        zero = tl.load(zeros + block, mask=block < blocks, other=0.0)
        y = _around_zero(y, zero, low, high, HOW[2])
    else:
        y = on_grid(y, thresholds, values, GRID)
    tl.store(out + block * elements + column, (y * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _moved(y, shifts, block, column, inside, elements, grid, GRID: tl.constexpr, HOW: tl.constexpr):
    """``y`` moved by its shift, and the gap in whose units that was."""
    shift = tl.load(shifts + block * elements + column, mask=inside, other=0.0)
    if HOW[4]:
        COUNT: tl.constexpr = GRID[1]
        HALVES: tl.constexpr = HOW[5]
        gap = _gap(y, grid, COUNT, HALVES)
        moved = y + shift * gap
    else:
        gap = tl.full(y.shape, 1.0, tl.float32)
        moved = y + shift
    return moved, gap


@triton.jit
def _scaled_backward(
    gradients, x, scales, zeros, shifts, grid, to_x, to_scale, to_shift, thresholds, values, blocks, elements, tiles,
    low, high, first, last, share, FOR_X: tl.constexpr, FOR_SCALE: tl.constexpr, GRID: tl.constexpr, HOW: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """PARTS: tiles of a program, which makes one sum of them a block."""
    tile = tl.program_id(0) % tiles
    block = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    scale = tl.load(scales + block, mask=block < blocks, other=1.0)
    by = divisor(scale)
    if HOW[1]:
        zero = tl.load(zeros + block, mask=block < blocks, other=0.0)
        bottom, top = (low - zero) - first, (high - zero) + last
    else:
        bottom, top = first, last
    direct = tl.zeros((ROWS, 1), tl.float32)
    through = tl.zeros((ROWS, 1), tl.float32)
    for part in range(PARTS):
        start = (tile * PARTS + part) * COLUMNS
        column = start + tl.arange(0, COLUMNS)[None, :]
        inside = (block < blocks) & (column < elements)
        v = tl.load(x + block * elements + column, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(gradients + block * elements + column, mask=inside, other=0.0).to(tl.float32)
        y0 = divided(v, by)
        y = y0
        if HOW[3]:
            y, gap = _moved(y0, shifts, block, column, inside, elements, grid, GRID, HOW)
        passed = tl.where((y >= bottom) & (y <= top), g * scale, 0.0)
        if FOR_X:
            found = divided(passed, by)
            tl.store(to_x + block * elements + column, found.to(to_x.dtype.element_ty), mask=inside)
        if HOW[3]:
            tl.store(to_shift + block * elements + column, passed * gap, mask=inside)
        if FOR_SCALE:
            if HOW[1]:
                rounded = _around_zero(y, zero, low, high, HOW[2])
            else:
                rounded = on_grid(y, thresholds, values, GRID)
            direct += tl.sum(tl.where(inside, g * rounded, 0.0), 1)[:, None]
            through += tl.sum(tl.where(inside, -passed * divided(y0, by), 0.0), 1)[:, None]
    if FOR_SCALE:
        total = (direct + tl.where(scale == 0, 0.0, through)) * share
        tl.store(to_scale + block * tiles + tile, total, mask=block < blocks)


def scaled_round(blocks: Tensor, scale: Tensor, fmt: str, rounding: str, reciprocal: bool = False) -> Tensor:
    """See :func:`nybble.ops.blocks.scaled_round`."""
    return _forward(blocks, scale, None, None, fmt, rounding, reciprocal)


def straight_round(
    blocks: Tensor, scale: Tensor, zero: Tensor | None, shift: Tensor | None, fmt: str, rounding: str,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """See :func:`nybble.ops.straight.straight_round`."""
    twice = dtype not in (None, blocks.dtype) and blocks.dtype != torch.float32
    if twice or not _codes_even(zero, rounding):
        found: Tensor = straight.straight_round._init_fn(blocks, scale, zero, shift, fmt, rounding, dtype)
        return found
    return _forward(blocks, scale, zero, shift, fmt, rounding, False, dtype)


def _forward(
    blocks: Tensor, scale: Tensor, zero: Tensor | None, shift: Tensor | None, fmt: str, rounding: str, reciprocal: bool,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    blocks, scale = blocks.contiguous(), scale.float()
    out = torch.empty_like(blocks, dtype=dtype)
    if not blocks.numel():
        return out
    zero, shift = _contiguous(zero), _contiguous(shift)
    count, elements = blocks.shape
    stride = steps(scale, elements)
    plan = _plan(fmt, rounding, zero is not None, shift is not None, blocks.device)
    key = ("forward", plan.key, reciprocal, count, elements, stride, traits(blocks, scale, zero, shift, out))

    def more() -> Told:
        tiles = cut(count, elements, across=True)
        meta = {"GRID": plan.grid.grid, "HOW": (reciprocal, *plan.how[1:6], stride[1] != 0), "ROWS": tiles.rows,
                "COLUMNS": tiles.columns, **EXACT}  # fmt: skip
        return (count, elements, tiles.programs[1], *stride, plan.low, plan.high), _in_line(tiles), meta

    sides = _or(zero, blocks), _or(shift, blocks), plan.table
    with on(blocks):
        _launches(key, _scaled, (blocks, scale, *sides, out, plan.grid.thresholds, plan.grid.values), more)
    return out


def straight_round_backward(
    gradient: Tensor, blocks: Tensor, scale: Tensor, zero: Tensor | None, shift: Tensor | None, fmt: str, rounding: str,
    far: bool, for_blocks: bool, for_scale: bool, share: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See :func:`nybble.ops.straight.straight_round_backward`."""
    if not _codes_even(zero, rounding):
        found: tuple[Tensor, Tensor, Tensor] = straight.straight_round_backward._init_fn(
            gradient, blocks, scale, zero, shift, fmt, rounding, far, for_blocks, for_scale, share
        )
        return found
    gradient, blocks, scale = gradient.contiguous(), blocks.contiguous(), scale.contiguous()
    zero, shift = _contiguous(zero), _contiguous(shift)
    count, elements = blocks.shape
    # A block's sum is one program's, but where the block is so long that its programs' sums are added up afterwards.
    across = not for_scale or elements > LONGEST
    tiles = cut(count, elements, across=across)
    to_x = torch.empty_like(blocks) if for_blocks else blocks.new_empty(0)
    to_scale = scale.new_empty((count, tiles.programs[1]) if for_scale else 0)
    to_shift = scale.new_empty(0 if shift is None else blocks.shape)
    if not blocks.numel():
        return to_x, to_scale.sum(1, keepdim=True) if for_scale else to_scale, to_shift
    plan = _plan(fmt, rounding, zero is not None, shift is not None, blocks.device)
    made = traits(gradient, blocks, scale, zero, shift, to_x, to_scale, to_shift)
    key = ("backward", plan.key, far, for_blocks, for_scale, share, count, elements, made)

    def more() -> Told:
        first, last = ((0.5, 0.5) if far else (0.0, 0.0)) if plan.how[1] else straight.ends(fmt, None, far)
        meta = {"FOR_X": for_blocks, "FOR_SCALE": for_scale, "GRID": plan.grid.grid, "HOW": plan.how,
                "ROWS": tiles.rows, "COLUMNS": tiles.columns,
                "PARTS": 1 if across else triton.cdiv(elements, tiles.columns), **EXACT}  # fmt: skip
        numbers = (count, elements, tiles.programs[1], plan.low, plan.high, float(first), float(last), share)
        return numbers, _in_line(tiles), meta

    sides = _or(zero, blocks), _or(shift, blocks), plan.table
    args = (gradient, blocks, scale, *sides, to_x, to_scale, to_shift, plan.grid.thresholds, plan.grid.values)
    with on(blocks):
        _launches(key, _scaled_backward, args, more)
    return to_x, to_scale.sum(1, keepdim=True) if for_scale and across else to_scale, to_shift


@dataclass(frozen=True)
class _Plan:
    """How to round.

    Attributes:
        key: what it was made of.
        grid: how one element is rounded. how: ``HOW`` of the kernels. table: the grid's values, for gaps.
        low, high: the format's.
    """

    key: tuple[Any, ...]
    grid: Way
    how: tuple[Any, ...]
    table: Tensor
    low: float
    high: float


@lru_cache(maxsize=256)
def _plan(fmt: str, rounding: str, zero: bool, shift: bool, device: torch.device) -> _Plan:
    """For zero points and shifts, or without."""
    form, table = get_format(fmt), grid_table(fmt, device)
    how = (False, zero, get_rounding(rounding).zero_inside, shift, shift and not form.in_ones,
           halves(table.numel() + 1), False)  # fmt: skip
    grid = way(fmt, "nearest-even" if zero else rounding, device)
    return _Plan((fmt, rounding, zero, shift, device), grid, how, table, float(form.min), float(form.max))


def _in_line(tiles: Cut) -> tuple[int, int, int]:
    """All programs along the first axis: the others end at 65535."""
    return tiles.programs[0] * tiles.programs[1], 1, 1


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A pointer for the kernel, which doesn't read it where there is no tensor."""
    return other if tensor is None else tensor


def _codes_even(zero: Tensor | None, rounding: str) -> bool:
    """Whether zero points go with a rounding that the kernels have."""
    rule = get_rounding(rounding)
    return zero is None or rule.zero_inside or rule.name == "nearest-even"


for _op, _fast in (
    (block_ops.scaled_round, scaled_round),
    (straight.straight_round, straight_round),
    (straight.straight_round_backward, straight_round_backward),
):
    _op.register_kernel("cuda")(_fast)
