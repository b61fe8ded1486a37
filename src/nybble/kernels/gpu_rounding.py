# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""GPU versions of the operations that round each element by itself, in Triton: one pass over memory, the same bits.

How one element is rounded is in :mod:`nybble.kernels._gpu_grids`; scales are in :mod:`nybble.kernels.gpu_scales`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.formats import get_format
from nybble.kernels._gpu_blocks import EXACT, on
from nybble.kernels._gpu_grids import code_of, halves, on_grid, rank, signed, way, whole, within
from nybble.ops import rounding as rounding_ops
from nybble.ops import tables as table_ops
from nybble.ops.rounding import decode_table
from nybble.rounding import get_rounding

_BLOCK = 1024


@triton.jit
def _round_to(x, out, thresholds, values, count, GRID: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(out + at, on_grid(y, thresholds, values, GRID).to(out.dtype.element_ty), mask=at < count)


@triton.jit
def _encode(
    x, out, thresholds, values, codes, count, GRID: tl.constexpr, CODING: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x + at, mask=at < count, other=0.0).to(tl.float32)
    code = code_of(y, thresholds, values, codes, GRID, CODING)
    tl.store(out + at, code.to(out.dtype.element_ty), mask=at < count)


@triton.jit
def _look_up(codes, out, table, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    code = tl.load(codes + at, mask=at < count, other=0).to(tl.int32)
    tl.store(out + at, tl.load(table + code), mask=at < count)


@triton.jit
def _ranked(
    x, out, thresholds, table, count,
    COUNT: tl.constexpr, HALVES: tl.constexpr, KEEPS_NAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x + at, mask=at < count, other=0.0).to(tl.float32)
    found = tl.load(table + rank(y, thresholds, COUNT, HALVES))
    if KEEPS_NAN:
        found = tl.where(y != y, y, found)
    tl.store(out + at, found, mask=at < count)


@triton.jit
def _around(
    y, lower, upper, values, count,
    COUNT: tl.constexpr, HALVES: tl.constexpr, MINUS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    own = tl.load(y + at, mask=at < count, other=0.0)
    above = rank(own, values, COUNT + 1, HALVES)
    first = tl.load(values + tl.maximum(above - 1, 0))
    second = tl.load(values + tl.minimum(above, COUNT - 1))
    if MINUS:
        first, second = signed(first, own), signed(second, own)
    tl.store(lower + at, tl.where(own != own, own, first), mask=at < count)
    tl.store(upper + at, tl.where(own != own, own, second), mask=at < count)


@triton.jit
def _to_codes(
    y, zeros, out, count, elements, row_step, step, low, high, INSIDE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    own = tl.load(y + at, mask=at < count, other=0.0)
    zero = tl.load(zeros + (at // elements) * row_step + (at % elements) * step, mask=at < count, other=0.0)
    tl.store(out + at, codes_around(own, zero, low, high, INSIDE), mask=at < count)


@triton.jit
def codes_around(y, zero, low, high, INSIDE: tl.constexpr):
    """:func:`nybble.ops.rounding.round_to_codes` of ties to even; what is far beyond the codes is held first."""
    if INSIDE:
        moved = y + zero
        found = whole(within(moved, low, high)) + 0.0
        return tl.where(moved != moved, moved, found)
    else:
        found = within(whole(within(y, -1048576.0, 1048576.0)) + zero, low, high)
        return tl.where((y != y) | (zero != zero), float("nan"), found)


def round_to(x: Tensor, fmt: str, rounding: str) -> Tensor:
    """See :func:`nybble.ops.rounding.round_to`."""
    x = x.contiguous()
    out, how = torch.empty_like(x), way(fmt, rounding, x.device)
    _run(_round_to, x, out, how.thresholds, how.values, x.numel(), GRID=how.grid)
    return out


def encode(x: Tensor, fmt: str, rounding: str) -> Tensor:
    """See :func:`nybble.ops.rounding.encode`."""
    x = x.contiguous()
    out = torch.empty_like(x, dtype=rounding_ops.code_dtype(get_format(fmt)))
    how = way(fmt, rounding, x.device)
    _run(_encode, x, out, how.thresholds, how.values, how.codes, x.numel(), GRID=how.grid, CODING=how.coding)
    return out


def decode(codes: Tensor, fmt: str) -> Tensor:
    """See :func:`nybble.ops.rounding.decode`."""
    return table_decode(codes, decode_table(fmt, codes.device))


def table_decode(codes: Tensor, values: Tensor) -> Tensor:
    """See :func:`nybble.ops.tables.table_decode`."""
    codes = codes.contiguous()
    out = torch.empty_like(codes, dtype=values.dtype)
    _run(_look_up, codes, out, values.contiguous(), codes.numel())
    return out


def table_round(x: Tensor, thresholds: Tensor, values: Tensor) -> Tensor:
    """See :func:`nybble.ops.tables.table_round`."""
    x = x.contiguous()
    out = torch.empty_like(x)
    tables = thresholds.contiguous(), values.contiguous()
    _run(_ranked, x, out, *tables, x.numel(), COUNT=values.numel(), HALVES=halves(values.numel()), KEEPS_NAN=True)
    return out


def table_encode(x: Tensor, thresholds: Tensor, codes: Tensor) -> Tensor:
    """See :func:`nybble.ops.tables.table_encode`."""
    x = x.contiguous()
    out = torch.empty_like(x, dtype=codes.dtype)
    tables = thresholds.contiguous(), codes.contiguous()
    _run(_ranked, x, out, *tables, x.numel(), COUNT=codes.numel(), HALVES=halves(codes.numel()), KEEPS_NAN=False)
    return out


def around(y: Tensor, values: Tensor, minus: bool) -> tuple[Tensor, Tensor]:
    """See :func:`nybble.ops.tables.around`."""
    y = y.contiguous()
    lower, upper = torch.empty_like(y), torch.empty_like(y)
    count = values.numel()
    _run(
        _around, y, lower, upper, values.contiguous(), y.numel(), COUNT=count, HALVES=halves(count + 1), MINUS=minus
    )  # fmt: skip
    return lower, upper


def whole_codes(y: Tensor, zero_point: Tensor, low: float, high: float, rounding: str) -> Tensor:
    """See :func:`nybble.ops.rounding.whole_codes`."""
    rule = get_rounding(rounding)
    inner = zero_point.expand(y.shape)
    if y.dim() != 2 or not (rule.zero_inside or rule.name == "nearest-even"):
        found: Tensor = rounding_ops.whole_codes._init_fn(y, zero_point, low, high, rounding)
        return found
    y = y.contiguous()
    out = torch.empty_like(y)
    _run(
        _to_codes, y, inner, out, y.numel(), y.shape[1], inner.stride(0), inner.stride(1), float(low), float(high),
        INSIDE=rule.zero_inside,
    )  # fmt: skip
    return out


def _run(kernel, *args, **options) -> None:
    """Launch over all elements of the first argument."""
    count = args[0].numel()
    if count:
        with on(args[0]):
            kernel[(triton.cdiv(count, _BLOCK),)](*args, **options, BLOCK=_BLOCK, **EXACT)


for _op, _fast in (
    (rounding_ops.round_to, round_to),
    (rounding_ops.encode, encode),
    (rounding_ops.decode, decode),
    (rounding_ops.whole_codes, whole_codes),
    (table_ops.table_round, table_round),
    (table_ops.table_encode, table_encode),
    (table_ops.table_decode, table_decode),
    (table_ops.around, around),
):
    _op.register_kernel("cuda")(_fast)
