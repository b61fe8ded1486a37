# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""GPU versions of rounding by given scales, forward and backward, in Triton: one pass over memory each."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.formats import get_format
from nybble.kernels._gpu_blocks import EXACT, LONGEST, cut, divided, divisor, on, steps
from nybble.kernels._gpu_grids import halves, on_grid, rank, way, whole, within
from nybble.ops import blocks as block_ops
from nybble.ops import straight
from nybble.ops.rounding import grid_table
from nybble.rounding import get_rounding


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
    x, scales, zeros, shifts, grid, out, thresholds, values, blocks, elements, row_step, step, low, high,
    GRID: tl.constexpr, HOW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """HOW: reciprocal, zero points, added before rounding, shifted, by gaps, steps to a gap."""
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
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
    gradients, x, scales, zeros, shifts, grid, to_x, to_scale, to_shift, thresholds, values, blocks, elements, low,
    high, first, last, FOR_X: tl.constexpr, FOR_SCALE: tl.constexpr, GRID: tl.constexpr, HOW: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """PARTS: tiles of a program, which makes the sums of whole blocks."""
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
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
        start = (tl.program_id(1) + part) * COLUMNS
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
        tl.store(to_scale + block, direct + tl.where(scale == 0, 0.0, through), mask=block < blocks)


def scaled_round(blocks: Tensor, scale: Tensor, fmt: str, rounding: str, reciprocal: bool = False) -> Tensor:
    """See :func:`nybble.ops.blocks.scaled_round`."""
    return _forward(blocks, scale, None, None, fmt, rounding, reciprocal)


def straight_round(
    blocks: Tensor, scale: Tensor, zero: Tensor | None, shift: Tensor | None, fmt: str, rounding: str
) -> Tensor:
    """See :func:`nybble.ops.straight.straight_round`."""
    if not _codes_even(zero, rounding):
        found: Tensor = straight.straight_round._init_fn(blocks, scale, zero, shift, fmt, rounding)
        return found
    return _forward(blocks, scale, zero, shift, fmt, rounding, False)


def _forward(
    blocks: Tensor, scale: Tensor, zero: Tensor | None, shift: Tensor | None, fmt: str, rounding: str, reciprocal: bool
) -> Tensor:
    blocks, scale = blocks.contiguous(), scale.float()
    out, form = torch.empty_like(blocks), get_format(fmt)
    count, elements = blocks.shape
    grid, how, given = _given(blocks, zero, shift, fmt, rounding)
    row_step, step = steps(scale, elements)
    tiles = cut(count, elements, across=True)
    if blocks.numel():
        with on(blocks):
            _scaled[tiles.programs](
                blocks, scale, *given, out, grid.thresholds, grid.values, count, elements, row_step, step,
                float(form.min), float(form.max), GRID=grid.grid, HOW=(reciprocal, *how[1:6], step != 0),
                ROWS=tiles.rows, COLUMNS=tiles.columns, **EXACT,
            )  # fmt: skip
    return out


def straight_round_backward(
    gradient: Tensor, blocks: Tensor, scale: Tensor, zero: Tensor | None, shift: Tensor | None, fmt: str, rounding: str,
    far: bool, for_blocks: bool, for_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See :func:`nybble.ops.straight.straight_round_backward`."""
    count, elements = blocks.shape
    if not _codes_even(zero, rounding) or (for_scale and elements > LONGEST):
        found: tuple[Tensor, Tensor, Tensor] = straight.straight_round_backward._init_fn(
            gradient, blocks, scale, zero, shift, fmt, rounding, far, for_blocks, for_scale
        )
        return found
    gradient, blocks, scale = gradient.contiguous(), blocks.contiguous(), scale.contiguous()
    form = get_format(fmt)
    to_x = torch.empty_like(blocks) if for_blocks else blocks.new_empty(0)
    to_scale = scale.new_empty(scale.shape if for_scale else 0)
    to_shift = scale.new_empty(0 if shift is None else blocks.shape)
    grid, how, given = _given(blocks, zero, shift, fmt, rounding)
    first, last = ((0.5, 0.5) if far else (0.0, 0.0)) if zero is not None else straight.ends(fmt, None, far)
    tiles = cut(count, elements, across=not for_scale)
    if blocks.numel():
        with on(blocks):
            _scaled_backward[tiles.programs](
                gradient, blocks, scale, *given, to_x, to_scale, to_shift, grid.thresholds, grid.values, count,
                elements, float(form.min), float(form.max), float(first), float(last), FOR_X=for_blocks,
                FOR_SCALE=for_scale, GRID=grid.grid, HOW=how, ROWS=tiles.rows, COLUMNS=tiles.columns,
                PARTS=triton.cdiv(elements, tiles.columns) if for_scale else 1, **EXACT,
            )  # fmt: skip
    return to_x, to_scale, to_shift


def _given(
    blocks: Tensor, zero: Tensor | None, shift: Tensor | None, fmt: str, rounding: str
) -> tuple[Any, tuple[Any, ...], tuple[Tensor, Tensor, Tensor]]:
    """How to round, ``HOW`` of the kernels, and zero points, shifts and values of the grid, where there are such."""
    form = get_format(fmt)
    found = way(fmt, "nearest-even" if zero is not None else rounding, blocks.device)
    by_gaps = shift is not None and not form.in_ones
    values = grid_table(fmt, blocks.device)
    how = (False, zero is not None, get_rounding(rounding).zero_inside, shift is not None, by_gaps,
           halves(values.numel() + 1), False)  # fmt: skip
    given = (blocks if zero is None else zero.contiguous(), blocks if shift is None else shift.contiguous(), values)
    return found, how, given


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
