# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""GPU versions of the operations that measure: a block's largest magnitude, its scale, and rounding by it.

Blocks of up to ``LONGEST`` elements are one program's (several short ones share one); of longer ones the largest
magnitudes come from all programs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.formats import get_format
from nybble.kernels._gpu_blocks import EXACT, LONGEST, Cut, cut, divided, divisor, magnitude, on
from nybble.kernels._gpu_grids import on_grid, way
from nybble.ops import blocks as block_ops
from nybble.ops import measured
from nybble.ops.scaling import pow2_carry

_WHOLE = 4096
"""Elements of a tile: a block that fits is read once."""
_WITHOUT_ZERO = "binary"
_NARROW = {"float32": 0, "float16": 1, "bfloat16": 2}


@triton.jit
def _largest_of(x, block, blocks, elements, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    """Bits of the largest magnitudes of some blocks, a column."""
    bits = tl.zeros((block.shape[0], 1), tl.int32)
    for part in range(PARTS):
        v = _part(x, block, blocks, part * COLUMNS, elements, COLUMNS)
        bits = tl.maximum(bits, tl.max(magnitude(v), 1)[:, None])
    return bits


@triton.jit
def _part(x, block, blocks, start, elements, COLUMNS: tl.constexpr):
    column = start + tl.arange(0, COLUMNS)[None, :]
    inside = (block < blocks) & (column < elements)
    return tl.load(x + block * elements + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def scale_of(bits, target, carry, RULE: tl.constexpr):
    """:func:`nybble.ops.blocks.block_scale` of bits of magnitudes, RULE as :func:`_rule` makes it."""
    if RULE[0]:
        EXPONENT: tl.constexpr = RULE[3]
        least = tl.zeros(bits.shape, tl.int32) + EXPONENT
        read = bits
        if EXPONENT < 1:  # where a magnitude is subnormal its bits don't tell its exponent
            small = bits < 0x3F800000
            grown = bits.to(tl.float32, bitcast=True) * RULE[4]
            read = tl.where(small, grown.to(tl.int32, bitcast=True), bits)
            least = tl.where(small, 1, least)
        biased = tl.minimum(tl.maximum(((read + carry) >> 23) - least, 0), 254)
        scale = tl.maximum(biased << 23, 1 << 22).to(tl.float32, bitcast=True)
        if not RULE[2]:
            scale = tl.where(bits == 0, 0.0, scale)
        scale = tl.where(bits < 0x7F800000, scale, float("nan"))
    else:
        scale = divided(bits.to(tl.float32, bitcast=True), target)
        if RULE[2]:
            scale = divisor(scale)
    if RULE[1] == 1:
        scale = tl.where(_kept(scale), scale, tl.minimum(tl.maximum(scale, 5.960464477539063e-08), 65504.0))
        scale = scale.to(tl.float16).to(tl.float32)
    elif RULE[1] == 2:
        held = tl.maximum(magnitude(scale), 1 << 16).to(tl.float32, bitcast=True)  # the smallest subnormal
        scale = _to_bfloat16(tl.where(_kept(scale), scale, tl.minimum(held, 3.3895313892515355e38)))
    return scale


@triton.jit
def _kept(scale):
    return (scale == 0) | (scale == float("inf")) | (scale != scale)


@triton.jit
def _to_bfloat16(scale):
    """Ties to even, by the bits: as the hardware does it."""
    bits = scale.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16
    return tl.where(scale != scale, scale, rounded.to(tl.float32, bitcast=True))


@triton.jit
def _dynamic(
    x, out, thresholds, values, blocks, elements, target, carry,
    RULE: tl.constexpr, GRID: tl.constexpr, ROUNDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Rounded blocks, or (not ROUNDS) their scales."""
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    scale = scale_of(_largest_of(x, block, blocks, elements, COLUMNS, PARTS), target, carry, RULE)
    if ROUNDS:
        by = divisor(scale)
        for part in range(PARTS):
            start = part * COLUMNS
            y = divided(_part(x, block, blocks, start, elements, COLUMNS), by)
            y = on_grid(y, thresholds, values, GRID) * scale
            column = start + tl.arange(0, COLUMNS)[None, :]
            inside = (block < blocks) & (column < elements)
            tl.store(out + block * elements + column, y.to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(out + block, scale, mask=block < blocks)


@triton.jit
def _largest(
    x, out, top, blocks, elements, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Bits of each block's largest magnitude, and of the largest of all."""
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    bits = _largest_of(x, block, blocks, elements, COLUMNS, PARTS)
    tl.store(out + block, bits, mask=block < blocks)
    tl.atomic_max(top, tl.max(tl.max(bits, 1), 0))


@triton.jit
def _largest_part(x, out, elements, COLUMNS: tl.constexpr):
    """One program of several that share a block: ``out`` begins at 0."""
    block = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    v = tl.load(x + block * elements + column, mask=column < elements, other=0.0).to(tl.float32)
    tl.atomic_max(out + block, tl.max(magnitude(v), 0))


@triton.jit
def _nested(
    largest, top, out, thresholds, values, count, target, inner_target, least, GRID: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bits = tl.load(largest + at, mask=at < count, other=0)
    raw = divided(bits.to(tl.float32, bitcast=True), target)
    most = tl.load(top + tl.zeros((BLOCK,), tl.int32)).to(tl.float32, bitcast=True)
    outer = divisor(divided(divided(most, target), inner_target))
    y = tl.math.div_rn(raw, outer)
    y = tl.where(y != y, y, tl.maximum(y, least))
    tl.store(out + at, on_grid(y, thresholds, values, GRID) * outer, mask=at < count)


def dynamic_round(blocks: Tensor, fmt: str, rounding: str, target: float, pow2: str, scale_dtype: str) -> Tensor:
    """See :func:`nybble.ops.blocks.dynamic_round`."""
    blocks = blocks.contiguous()
    if blocks.numel() and blocks.shape[1] > LONGEST:
        scale = dynamic_scale(blocks, fmt, target, pow2, scale_dtype)
        found: Tensor = block_ops.scaled_round(blocks, scale, fmt, rounding)
        return found
    return _measure(blocks, torch.empty_like(blocks), (fmt, rounding), target, pow2, scale_dtype)


def dynamic_scale(blocks: Tensor, fmt: str, target: float, pow2: str, scale_dtype: str) -> Tensor:
    """See :func:`nybble.ops.measured.dynamic_scale`."""
    blocks = blocks.contiguous()
    if blocks.shape[1] > LONGEST:
        amax = largest(blocks)[0].view(torch.float32)
        return block_ops.block_scale(amax, fmt, target, pow2, scale_dtype)
    out = blocks.new_empty((blocks.shape[0], 1), dtype=torch.float32)
    return _measure(blocks, out, (fmt, ""), target, pow2, scale_dtype)


def nested_scale(blocks: Tensor, target: float, inner: str, inner_target: float, least: float) -> Tensor:
    """See :func:`nybble.ops.measured.nested_scale`."""
    bits, top = largest(blocks.contiguous())
    out, how = torch.empty_like(bits, dtype=torch.float32), way(inner, "nearest-even", blocks.device)
    count = bits.numel()
    if count:
        with on(blocks):
            _nested[(triton.cdiv(count, 1024),)](
                bits, top, out, how.thresholds, how.values, count, float(target), float(inner_target), float(least),
                GRID=how.grid, BLOCK=1024, **EXACT,
            )  # fmt: skip
    return out


def narrowed(scale: Tensor, dtype: str) -> Tensor:
    """See :func:`nybble.ops.blocks.narrowed`: each is a block of its own, in a format that keeps 0 as it is."""
    found = dynamic_scale(scale.reshape(-1, 1), _WITHOUT_ZERO, 1.0, "", dtype)
    return torch.copysign(found.view(scale.shape), scale.contiguous())


def largest(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Bits of the largest magnitudes, int32: of each block [blocks, 1], and of all [1]."""
    count, elements = blocks.shape
    top = torch.zeros(1, dtype=torch.int32, device=blocks.device)
    if elements > LONGEST:
        out = torch.zeros((count, 1), dtype=torch.int32, device=blocks.device)
        with on(blocks):
            _largest_part[(count, triton.cdiv(elements, 8192))](blocks, out, elements, COLUMNS=8192)
        return out, out.amax().reshape(1)
    out = torch.empty((count, 1), dtype=torch.int32, device=blocks.device)
    tiles = _tiles(count, elements)
    if blocks.numel():
        with on(blocks):
            _largest[tiles.programs](
                blocks,
                out,
                top,
                count,
                elements,
                ROWS=tiles.rows,
                COLUMNS=tiles.columns,
                PARTS=triton.cdiv(elements, tiles.columns),
            )
    return out, top


def _measure(blocks: Tensor, out: Tensor, names: tuple[str, str], target: float, pow2: str, narrow: str) -> Tensor:
    count, elements = blocks.shape
    fmt = get_format(names[0])
    exponent = math.frexp(fmt.absmax)[1] - 1
    rule = (bool(pow2), _NARROW[narrow], fmt.has_zero, exponent, 2.0 ** min(127, 1 - exponent) if exponent < 1 else 0.0)
    tables: tuple[Any, ...] = (out, out, ())
    if names[1]:
        how = way(*names, blocks.device)
        tables = how.thresholds, how.values, how.grid
    tiles = _tiles(count, elements)
    if blocks.numel():
        with on(blocks):
            _dynamic[tiles.programs](
                blocks, out, *tables[:2], count, elements, float(target), pow2_carry(fmt, pow2) if pow2 else 0,
                RULE=rule, GRID=tables[2], ROUNDS=bool(names[1]), ROWS=tiles.rows, COLUMNS=tiles.columns,
                PARTS=triton.cdiv(elements, tiles.columns), **EXACT,
            )  # fmt: skip
    return out


def _tiles(count: int, elements: int) -> Cut:
    return cut(count, elements, across=False, tile=_WHOLE if elements > 2048 else 2048)


for _op, _fast in (
    (block_ops.dynamic_round, dynamic_round),
    (block_ops.narrowed, narrowed),
    (measured.dynamic_scale, dynamic_scale),
    (measured.nested_scale, nested_scale),
):
    _op.register_kernel("cuda")(_fast)
