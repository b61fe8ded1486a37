# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Activations onto the grids that tensor cores read, scales measured in the same kernel: the quantizer's own bits.

Two shapes of scales: one a row (``token``; or one that was calibrated), whose codes go to INT8 or FP8 products; and
one a block of a row (MXFP4, NVFP4 and their like), whose values times block scales are exact in bfloat16. Divisions
are IEEE's, maxima are taken of the bits of magnitudes (so that NaN comes out on top), and nothing is contracted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.kernels._gpu import Launches, aligned, shared

INT, E4M3, E2M1 = 0, 1, 2
"""How a kernel rounds: to integers between two bounds, to E4M3, to E2M1."""
_LONGEST = 8192
_ALONE = 1 << 15
"""Elements up to which each program finds the tensor's largest magnitude by itself: no second launch."""
_SHARES = 512
_launches = Launches()


@dataclass(frozen=True)
class Rows:
    """Rounded activations: ``(codes - zero) * scale``.

    Attributes:
        codes: [rows, columns], or [2, rows, columns / 2] of even and odd columns; int8, float8_e4m3fn or bfloat16.
        scale: float32 [rows] (of blocks: [1], what all block scales are multiplied with).
        zero: int32 [rows] or None.
        sums: int32 [rows, groups], sums of a group's codes, where they were asked for.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    sums: Tensor | None = None


@triton.jit
def _to_e2m1(y):
    a = tl.abs(y)
    one = tl.where(a > 0.25, 0.5, 0.0) + tl.where(a >= 0.75, 0.5, 0.0) + tl.where(a > 1.25, 0.5, 0.0)
    one += tl.where(a >= 1.75, 0.5, 0.0) + tl.where(a > 2.5, 1.0, 0.0) + tl.where(a >= 3.5, 1.0, 0.0)
    one += tl.where(a > 5.0, 2.0, 0.0)
    return tl.where(y < 0, -one, one)


@triton.jit
def _whole(y):
    """Ties to even, for magnitudes below 2^22."""
    return (y + 12582912.0) - 12582912.0


@triton.jit
def _to_e4m3(y):
    """As :mod:`nybble.kernels._rounders` has it: the float32 adder rounds at the place of E4M3's last bit."""
    power = (y.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    power = tl.minimum(tl.maximum(power, 0.015625), 256.0) * 1572864.0
    return (y + power) - power


@triton.jit
def _on_grid(y, low, high, KIND: tl.constexpr):
    """``y`` clamped and rounded: float32 values of the grid."""
    y = tl.minimum(tl.maximum(y, low), high)
    if KIND == 0:
        y = _whole(y)
    elif KIND == 1:
        y = _to_e4m3(y)
    else:
        y = _to_e2m1(y)
    return y


@triton.jit
def _magnitude(x):
    """Bits of |x| as an integer, in whose order NaN is the largest."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _given_row(row, bits, scale_in, zero_in, MANY: tl.constexpr, ZERO: tl.constexpr):
    at = row if MANY else 0
    scale = tl.load(scale_in + at)
    zero = 0.0
    if ZERO:
        zero = tl.load(zero_in + at)
    lost = (bits > 0x7F800000) | (scale == float("inf"))
    return tl.where(lost, float("nan"), scale), scale, zero


@triton.jit
def _measured_row(bits, least, most, target, low, high, ZERO: tl.constexpr):
    """Scale to store, scale to divide by, zero point: of a row's largest magnitude, or of its range."""
    zero = 0.0
    if ZERO:
        least, most = tl.minimum(least, 0.0), tl.maximum(most, 0.0)
        span = high - low
        width = most - least
        apart = tl.math.div_rn(most, span) - tl.math.div_rn(least, span)
        scale = tl.where(width < float("inf"), tl.math.div_rn(width, span), apart)
        scale = tl.where(scale == 0, 1.0, scale)
        zero = _whole(tl.minimum(tl.maximum(low - tl.math.div_rn(least, scale), low), high))
    else:
        scale = tl.math.div_rn(bits.to(tl.float32, bitcast=True), target)
        scale = tl.where(scale == 0, 1.0, scale)
    return tl.where(bits >= 0x7F800000, float("nan"), scale), scale, zero


@triton.jit
def _tokens(
    x, codes, scales, zeros, sums, scale_in, zero_in, rows, stride, target, low, high, shift, factor,
    columns: tl.constexpr, KIND: tl.constexpr, GIVEN: tl.constexpr, MANY: tl.constexpr, ZERO: tl.constexpr,
    INSIDE: tl.constexpr, SHIFTED: tl.constexpr, PLANES: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    bits, least, most = 0, 0.0, 0.0
    for start in range(0, columns, BLOCK):
        v = tl.load(x + row * stride + start + at, mask=start + at < columns, other=0.0).to(tl.float32)
        bits = tl.maximum(bits, tl.max(_magnitude(v), 0))
        if ZERO and not GIVEN:
            least, most = tl.minimum(least, tl.min(v, 0)), tl.maximum(most, tl.max(v, 0))
    if GIVEN:
        stored, scale, zero = _given_row(row, bits, scale_in, zero_in, MANY, ZERO)
    else:
        stored, scale, zero = _measured_row(bits, least, most, target, low, high, ZERO)
    tl.store(scales + row, tl.math.div_rn(stored, factor))
    if ZERO or SHIFTED:
        tl.store(zeros + row, (zero - shift).to(tl.int32))
    scale = tl.where(scale == 0, 1.0, scale)
    added = 0
    for start in range(0, columns, BLOCK):
        inside = start + at < columns
        v = tl.load(x + row * stride + start + at, mask=inside, other=0.0).to(tl.float32)
        y = tl.math.div_rn(v, scale)
        if ZERO:
            if INSIDE:
                y = _on_grid(y + zero, low, high, 0)
            else:  # a far larger y comes to the same bound
                y = tl.minimum(tl.maximum(_whole(tl.minimum(tl.maximum(y, -1e6), 1e6)) + zero, low), high)
        else:
            y = _on_grid(y, low, high, KIND)
        y = tl.where(inside, (y - shift) * factor, 0.0)
        if columns == GROUP:
            added += tl.sum(y, 0).to(tl.int32)
        elif GROUP > 0:
            total = tl.sum(tl.reshape(y, (BLOCK // GROUP, GROUP)), 1)
            group = start // GROUP + tl.arange(0, BLOCK // GROUP)
            count = columns // GROUP
            tl.store(sums + row * count + group, total.to(tl.int32), mask=group < count)
        element = codes.dtype.element_ty
        if PLANES:
            even, odd = tl.split(tl.reshape(y, (BLOCK // 2, 2)))
            half = columns // 2
            pair = start // 2 + tl.arange(0, BLOCK // 2)
            to = codes + row * half + pair
            tl.store(to, even.to(element), mask=pair < half)
            tl.store(to + rows * half, odd.to(element), mask=pair < half)
        else:
            tl.store(codes + row * columns + start + at, y.to(element), mask=inside)
    if columns == GROUP:
        tl.store(sums + row, added)


@triton.jit
def _largest_of(x, first, last, BLOCK: tl.constexpr):
    """Of elements ``first`` to ``last``, the bits of the largest magnitude."""
    bits = tl.zeros((BLOCK,), tl.int32)
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        v = tl.load(x + at, mask=at < last, other=0.0).to(tl.float32)
        bits = tl.maximum(bits, _magnitude(v))
    return tl.max(bits, 0)


@triton.jit
def _largest(x, out, count, share, BLOCK: tl.constexpr):
    """Of each program's share."""
    first = tl.program_id(0).to(tl.int64) * share
    tl.store(out + tl.program_id(0), _largest_of(x, first, tl.minimum(first + share, count), BLOCK))


@triton.jit
def _power(bits, carry, emax):
    """:func:`nybble.ops.scaling.pow2_scale` of bits of magnitudes; formats whose largest binade is above 1."""
    biased = tl.minimum(tl.maximum(((bits + carry) >> 23) - emax, 0), 254)
    scale = tl.maximum(biased << 23, 1 << 22).to(tl.float32, bitcast=True)
    return tl.where(bits < 0x7F800000, scale, float("nan"))


@triton.jit
def _lost(v, scale, unit, low, high, KIND: tl.constexpr):
    y = tl.math.div_rn(v, tl.broadcast_to(scale, v.shape))
    error = (_on_grid(y, low, high, KIND) - y) * tl.math.div_rn(scale, unit)
    return tl.sum(error * error, 1)[:, None]


@triton.jit
def _blocks(
    x, out, outer_out, outer_in, largest, times, count, target, low, high, carry, emax,
    KIND: tl.constexpr, RULE: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, SHARES: tl.constexpr,
    TIMES: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """RULE 0: powers of two; 1: the better of two; 2: E4M3 over the tensor's scale; 3: E4M3 over a divisor.

    The tensor's largest magnitude is that of SHARES, or with 0 looked for by every program.
    """
    block = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = block[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    v = tl.load(x + at, mask=block[:, None] < count, other=0.0).to(tl.float32)
    bits = tl.max(_magnitude(v), 1)[:, None]
    outer = 1.0
    if RULE == 0:
        short = _power(bits, carry, emax)
        by = short
    elif RULE == 1:
        short = _power(bits, 0, emax)
        twice = tl.minimum(short * 2.0, 1.7014118346046923e38)
        better = _lost(v, twice, short, low, high, KIND) < _lost(v, short, short, low, high, KIND)
        short = tl.where(better, twice, short)
        by = short
    else:
        raw = tl.math.div_rn(bits.to(tl.float32, bitcast=True), target)
        if RULE == 2:
            if SHARES > 0:
                top = tl.max(tl.load(largest + tl.arange(0, SHARES)), 0)
            else:
                top = _largest_of(x, 0, count * GROUP, 4096)
            outer = tl.math.div_rn(tl.math.div_rn(top.to(tl.float32, bitcast=True), target), 448.0)
            outer = tl.where(outer == 0, 1.0, outer)
            outer = tl.where(top >= 0x7F800000, float("nan"), outer)
            y = tl.maximum(tl.math.div_rn(raw, tl.broadcast_to(outer, raw.shape)), 0.015625)
            short = _to_e4m3(tl.minimum(y, 448.0))
            by = short * outer
        else:
            divisor = tl.load(outer_in)
            raw = tl.where(raw * divisor <= 0.0009765625, tl.math.div_rn(0.125, divisor), raw)
            short = _to_e4m3(tl.minimum(raw * divisor, 448.0))
            by = tl.math.div_rn(short, tl.broadcast_to(divisor, short.shape))
            outer = tl.math.div_rn(1.0, divisor)
            short = tl.where(bits > 0x7F800000, float("nan"), short)
    if TIMES:
        outer = outer * tl.load(times)
    tl.store(outer_out, outer)
    by = tl.where(by == 0, 1.0, by)
    y = _on_grid(tl.math.div_rn(v, tl.broadcast_to(by, v.shape)), low, high, KIND)
    to = (at & 1) * (count * GROUP // 2) + (at >> 1) if PLANES else at
    tl.store(out + to, (y * short).to(out.dtype.element_ty), mask=block[:, None] < count)


def tokens(
    x: Tensor,
    kind: int,
    low: float,
    high: float,
    *,
    target: float = 0.0,
    given: tuple[Tensor, Tensor | None] | None = None,
    asymmetric: bool = False,
    inside: bool = False,
    dtype: torch.dtype = torch.int8,
    planes: bool = False,
    group: int = 0,
) -> Rows:
    """A scale a row.

    Args:
        x: float32, bfloat16 or float16 [rows, columns], its rows contiguous.
        kind: :data:`INT`, :data:`E4M3` or :data:`E2M1`.
        low: smallest value of the grid; with ``high`` above 127 codes are stored less 128.
        high: largest value.
        target: what the largest magnitude of a row is mapped to.
        given: scales and zero points, float32 [rows] or [1], instead of measured ones.
        asymmetric: measure a range and a zero point.
        inside: add the zero point before rounding.
        dtype: of the codes, which must hold the grid's values; E2M1's are doubled in int8.
        planes: even and odd columns apart, for weights of two codes a byte.
        group: columns of a group whose codes are added up, a power of two or all; 0: none are.
    """
    rows, columns = x.shape
    target, low, high = float(target), float(low), float(high)
    shift = 128.0 if high > 127 and kind == INT else 0.0
    factor = 2.0 if kind == E2M1 and dtype == torch.int8 else 1.0
    zero = asymmetric or (given is not None and given[1] is not None)
    many = given is not None and given[0].numel() > 1
    codes = x.new_empty((2, rows, columns // 2) if planes else (rows, columns), dtype=dtype)
    scale = x.new_empty(rows, dtype=torch.float32)
    zeros = x.new_empty(rows, dtype=torch.int32) if zero or shift else None
    sums = x.new_empty((rows, columns // group), dtype=torch.int32) if group else None
    scale_in, zero_in = (scale, None) if given is None else given
    block = _row_block(columns, group)
    if rows:
        args = (
            x, codes, scale, scale if zeros is None else zeros, scale if sums is None else sums,
            scale_in, scale_in if zero_in is None else zero_in,
        )  # fmt: skip
        told = (rows, columns, x.stride(0), kind, target, low, high, asymmetric, inside, dtype, planes, group)
        sides = None if given is None else (many, aligned(scale_in), aligned(zero_in))
        _launches((x.device, x.dtype, aligned(x), told, sides), _tokens, args, lambda: (
            (rows, x.stride(0), target, low, high, shift, factor),
            (rows, 1, 1),
            {"columns": columns, "KIND": kind, "GIVEN": given is not None, "MANY": many, "ZERO": zero, "INSIDE": inside,
             "SHIFTED": shift > 0, "PLANES": planes, "GROUP": group, "BLOCK": block,
             "num_warps": min(8, max(1, block // 512)), "enable_fp_fusion": False},
        ))  # fmt: skip
    return Rows(codes, scale, zeros, sums)


def _row_block(columns: int, group: int) -> int:
    return max(shared(min(columns, _LONGEST)), group if group < columns else 0)


def blocks(
    x: Tensor,
    kind: int,
    low: float,
    high: float,
    *,
    group: int,
    carry: int | None = None,
    emax: int = 0,
    divisor: Tensor | None = None,
    times: Tensor | None = None,
    planes: bool = False,
) -> Rows:
    """A scale a block of a row: powers of two where ``carry`` or ``emax`` say how, else E4M3.

    Args:
        x: float32, bfloat16 or float16 [rows, columns], contiguous; ``group`` divides columns.
        kind: as :func:`tokens`.
        low: as there.
        high: as there.
        group: columns of a block, a power of two.
        carry: of :func:`nybble.ops.scaling.pow2_carry`; None with ``emax``: the better of two scales.
        emax: exponent of the largest binade of the grid; 0: E4M3 scales.
        divisor: float32 [1], calibrated (NVFP4 as compressed-tensors has it); None measures the tensor's scale.
        times: float32 [1], by which the returned scale is multiplied.
        planes: even and odd columns apart.

    Returns:
        bfloat16 values times block scales, exact; the scale is what E4M3 scales are multiplied with.
    """
    rows, columns = x.shape
    out = x.new_empty((2, rows, columns // 2) if planes else (rows, columns), dtype=torch.bfloat16)
    count = x.numel() // group
    rule = (0 if carry is not None else 1) if emax else (2 if divisor is None else 3)
    outer = x.new_empty(1, dtype=torch.float32)
    if not count:
        return Rows(out, outer.fill_(1))
    largest, shares, where = outer, 0, (x.device, x.dtype, aligned(x))
    if rule == 2 and x.numel() > _ALONE:
        shares = min(_SHARES, shared(-(-x.numel() // 4096)))
        largest = x.new_empty(shares, dtype=torch.int32)
        each = -(-x.numel() // shares)
        _launches((*where, x.numel(), shares), _largest, (x, largest), lambda: (
            (x.numel(), each), (shares, 1, 1), {"BLOCK": 4096},
        ))  # fmt: skip
    per = max(1, (4096 if x.numel() > _ALONE else 1024) // group)
    args = (x, out, outer, outer if divisor is None else divisor, largest, outer if times is None else times)
    told = (count, low, high, carry, emax, kind, rule, group, per, shares, planes)
    _launches((*where, told, aligned(divisor), aligned(times)), _blocks, args, lambda: (
        (count, float(high), float(low), float(high), carry or 0, emax),
        (-(-count // per), 1, 1),
        {"KIND": kind, "RULE": rule, "GROUP": group, "BLOCK": per, "SHARES": shares, "TIMES": times is not None,
         "PLANES": planes, "enable_fp_fusion": False},
    ))  # fmt: skip
    return Rows(out, outer)
