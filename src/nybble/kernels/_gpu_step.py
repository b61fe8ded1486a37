# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""The Triton kernels of an optimizer's step: all tensors of a launch, one program for each tile of one of them.

A table has a row of addresses and sizes for each tensor, and a list of tiles says whose turn it is. States of rows and
columns take two passes: their maxima first, by which codes are then found.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nybble.kernels._gpu_blocks import divided, divisor, magnitude
from nybble.kernels._gpu_rules import HOST, decayed, second, updated
from nybble.kernels._gpu_states import (
    codes_of,
    measure_scales,
    read_codes,
    read_scales,
    read_values,
    scaled,
    write_codes,
)

(
    P, CODES1, SCALE1, CODES2, SCALE2, COLUMNS2, TOP_ROWS, TOP_COLUMNS, RESIDUAL, COUNT, WIDTH, ASIDE, ROW,
) = range(13)  # fmt: skip
"""Of a row of the table: addresses of the parameter, of codes (or of a state in float32) and scales, of factors by
columns, of both raw maxima, of the residual; elements, columns; address of the count of what was set aside; ROW: how
many there are."""
FLOAT32, BFLOAT16, FLOAT16 = range(3)
NEAREST, STOCHASTIC, RESIDUAL8 = range(3)


@triton.jit
def _at(table, row, FIELD: tl.constexpr):
    return tl.load(table + row * 13 + FIELD)


@triton.jit
def _floats(pointer, start, at, inside, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """float32, of a parameter or gradient."""
    if DTYPE == 0:
        data = pointer.to(tl.pointer_type(tl.float32))
        if ALIGNED:
            data = tl.multiple_of(data, 16)
        x = tl.load(data + start + at, mask=inside, other=0.0)
    else:
        data = pointer.to(tl.pointer_type(tl.int16))
        if ALIGNED:
            data = tl.multiple_of(data, 16)
        bits = tl.load(data + start + at, mask=inside, other=0)
        if DTYPE == 1:
            x = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
        else:
            x = bits.to(tl.float16, bitcast=True).to(tl.float32)
    return x


@triton.jit
def _to_bfloat16(x):
    """Its bits, int16: nearest, ties to even."""
    if HOST:
        bits = x.to(tl.int32, bitcast=True)
        near = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x != x, 0x7FC0, near).to(tl.int16)
    else:
        return x.to(tl.bfloat16).to(tl.int16, bitcast=True)


@triton.jit
def _joined(x, residual):
    """:func:`nybble.optim._weights.join24`."""
    bits = x.to(tl.int32, bitcast=True)
    low = (bits & 0x7FFFFFFF) + (residual << 8)
    low = tl.minimum(tl.maximum(low, 0), 0x7F7FFFFF)
    found = ((bits & -2147483648) | low).to(tl.float32, bitcast=True)
    return tl.where(magnitude(x) < 0x7F800000, found, x)


@triton.jit
def _split(x):
    """:func:`nybble.optim._weights.split24`: bits of a bfloat16, and the residual; int32."""
    size = magnitude(x)
    whole = (size + 0x7F + ((size >> 8) & 1)) >> 8
    whole = tl.minimum(whole, (0x7F7F << 8) + 0x7F)
    high = (whole + 0x80) >> 8
    finite = size < 0x7F800000
    sign = (x.to(tl.int32, bitcast=True) >> 16) & -32768
    bits = tl.where(finite, sign | high, _to_bfloat16(x).to(tl.int32))
    return bits, tl.where(finite, whole - (high << 8), 0)


@triton.jit
def _write(table, row, draws, start, at, inside, p, DTYPE: tl.constexpr, WEIGHTS: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = _at(table, row, 0)
    if DTYPE == 0:
        data = pointer.to(tl.pointer_type(tl.float32))
        if ALIGNED:
            data = tl.multiple_of(data, 16)
        tl.store(data + start + at, p, mask=inside)
    else:
        data = pointer.to(tl.pointer_type(tl.int16))
        if ALIGNED:
            data = tl.multiple_of(data, 16)
        if DTYPE == 2:
            bits = p.to(tl.float16).to(tl.int16, bitcast=True)
        elif WEIGHTS == 0:
            bits = _to_bfloat16(p)
        elif WEIGHTS == 1:
            random = tl.load(draws.to(tl.pointer_type(tl.int32)) + start + at, mask=inside, other=0)
            moved = ((p.to(tl.int32, bitcast=True) + random) & -65536).to(tl.float32, bitcast=True)
            bits = _to_bfloat16(tl.where(magnitude(p) < 0x7F800000, moved, p))
        else:
            high, residual = _split(p)
            bits = high.to(tl.int16)
            beside = _at(table, row, 8).to(tl.pointer_type(tl.int8))
            tl.store(beside + start + at, residual.to(tl.int8), mask=inside)
        tl.store(data + start + at, bits, mask=inside)


@triton.jit
def _rank1_scale(rows, columns, start, at, inside, width, TILE: tl.constexpr, LONG: tl.constexpr):
    """The smaller of an element's two factors; LONG: a row is no shorter than a tile."""
    first = start // width
    off = (start - first * width).to(tl.int32) + at
    wide = width.to(tl.int32)
    if LONG:
        over = (off >= wide).to(tl.int32)
        column = off - tl.where(off >= wide, wide, 0)
    else:
        over = off // wide
        column = off - over * wide
    by_row = tl.load(rows.to(tl.pointer_type(tl.float32)) + first + over, mask=inside, other=1.0)
    by_column = tl.load(columns.to(tl.pointer_type(tl.float32)) + column, mask=inside, other=1.0)
    return by_row, by_column


@triton.jit
def _decoded(
    table, row, start, at, left, inside, values, META: tl.constexpr, CODES: tl.constexpr, TILE: tl.constexpr,
    LONG: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    """A state, float32."""
    KIND: tl.constexpr = META[0]
    if KIND == 0:
        return tl.zeros((TILE,), tl.float32)
    elif KIND == 1:
        data = _at(table, row, CODES).to(tl.pointer_type(tl.float32))
        return tl.load(data + start + at, mask=inside, other=0.0)
    else:
        code = read_codes(_at(table, row, CODES), start, left, META[1], TILE)
        x = read_values(values, code, META)
        if SHORT:  # code 0 is no 0
            x = tl.where(inside, x, 0.0)
        if KIND == 2:
            return x * read_scales(_at(table, row, CODES + 1), start, left, META[2], TILE)
        else:
            r, c = _rank1_scale(
                _at(table, row, 4), _at(table, row, 5), start, at, inside, _at(table, row, 10), TILE, LONG
            )
            return x * tl.minimum(r, c)


@triton.jit
def _encoded(
    table, row, start, at, left, inside, x, thresholds, values, codes, META: tl.constexpr, CODES: tl.constexpr,
    TILE: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    KIND: tl.constexpr = META[0]
    if KIND == 1:
        data = _at(table, row, CODES).to(tl.pointer_type(tl.float32))
        tl.store(data + start + at, x, mask=inside)
    elif KIND > 1:
        if KIND == 2:
            scale = measure_scales(_at(table, row, CODES + 1), start, left, x, META, TILE)
            y = scaled(x, scale, META, TILE)
        else:
            r, c = _rank1_scale(
                _at(table, row, 6), _at(table, row, 7), start, at, inside, _at(table, row, 10), TILE, LONG
            )
            if META[5]:
                r, c = divisor(r), divisor(c)
            y = divided(x, divisor(tl.minimum(r, c)))
        found = codes_of(y, thresholds, values, codes, META)
        write_codes(_at(table, row, CODES), start, left, found, META[1], TILE)


@triton.jit
def step_kernel(
    table, given, work, values1, thresholds1, codes1, values2, thresholds2, codes2,
    rate, shrink, wd, b1, a1, b2, a2, root, inverse, eps, initial,
    RULE: tl.constexpr, FORMS: tl.constexpr, ONE: tl.constexpr, TWO: tl.constexpr, DTYPE: tl.constexpr,
    GRADIENT: tl.constexpr, WEIGHTS: tl.constexpr, GUARD: tl.constexpr, DECAY: tl.constexpr, FIRST: tl.constexpr,
    NESTEROV: tl.constexpr, ALIGNED: tl.constexpr, LONG: tl.constexpr, SHORT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One tile of one tensor; ``given`` has the addresses of gradients and of random numbers."""
    KIND1: tl.constexpr = ONE[0]
    KIND2: tl.constexpr = TWO[0]
    row = tl.load(work + tl.program_id(0) * 2).to(tl.int64)
    start = tl.load(work + tl.program_id(0) * 2 + 1).to(tl.int64) * TILE
    left = tl.minimum(_at(table, row, 9) - start, TILE).to(tl.int32)
    if ALIGNED:
        left = tl.multiple_of(left, 16)
    at = tl.arange(0, TILE)
    inside = at < left
    g = _floats(tl.load(given + row * 2), start, at, inside, GRADIENT, ALIGNED)
    before = _floats(_at(table, row, 0), start, at, inside, DTYPE, ALIGNED)
    if WEIGHTS == 2:
        beside = _at(table, row, 8).to(tl.pointer_type(tl.int8))
        before = _joined(before, tl.load(beside + start + at, mask=inside, other=0).to(tl.int32))
    one = _decoded(table, row, start, at, left, inside, values1, ONE, 1, TILE, LONG, SHORT)
    two = _decoded(table, row, start, at, left, inside, values2, TWO, 3, TILE, LONG, SHORT)
    if GUARD:
        ok = magnitude(g) < 0x7F800000
        g = tl.where(ok, g, 0.0)
    p, one, two = updated(
        before, g, one, two, rate, shrink, wd, b1, a1, b2, a2, root, inverse, eps, initial, RULE, FORMS, DECAY, FIRST, NESTEROV,
        KIND1 > 0,
    )  # fmt: skip
    if GUARD:
        if KIND1 > 0:
            ok = ok & (magnitude(one) < 0x7F800000)
        if KIND2 > 0:
            ok = ok & (magnitude(two) < 0x7F800000)
        one, two, p = tl.where(ok, one, 0.0), tl.where(ok, two, 0.0), tl.where(ok, p, before)
        aside = tl.sum((inside & (ok == 0)).to(tl.int32), 0)
        if aside > 0:
            tl.atomic_add(_at(table, row, 11).to(tl.pointer_type(tl.int32)), aside)
    _write(table, row, tl.load(given + row * 2 + 1), start, at, inside, p, DTYPE, WEIGHTS, ALIGNED)
    _encoded(table, row, start, at, left, inside, one, thresholds1, values1, codes1, ONE, 1, TILE, LONG)
    _encoded(table, row, start, at, left, inside, two, thresholds2, values2, codes2, TWO, 3, TILE, LONG)


@triton.jit
def maxima_kernel(
    table, given, work, values2, wd, b2, a2, initial,
    RULE: tl.constexpr, FORMS: tl.constexpr, TWO: tl.constexpr, DTYPE: tl.constexpr, GRADIENT: tl.constexpr,
    WEIGHTS: tl.constexpr, DECAY: tl.constexpr, FIRST: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """The largest new second state of each row and of each column, as bits: of one tile of one matrix."""
    BITS: tl.constexpr = TWO[1]
    row = tl.load(work + tl.program_id(0) * 3).to(tl.int64)
    width = _at(table, row, 10)
    height = (_at(table, row, 9) // width).to(tl.int32)
    r = tl.load(work + tl.program_id(0) * 3 + 1) * ROWS + tl.arange(0, ROWS)
    c0 = tl.load(work + tl.program_id(0) * 3 + 2) * COLUMNS
    left = width.to(tl.int32) - c0
    if ALIGNED:
        left = tl.multiple_of(left, 16)
        width = tl.multiple_of(width, 16)
    c = tl.arange(0, COLUMNS)
    inside = (r[:, None] < height) & (c[None, :] < left)
    line = r[:, None].to(tl.int64) * width + c0
    g = _floats(tl.load(given + row * 2), line, c[None, :], inside, GRADIENT, ALIGNED)
    data = _at(table, row, 3).to(tl.pointer_type(tl.uint8))
    if BITS == 8:
        code = tl.load(data + line + c[None, :], mask=inside, other=0).to(tl.int32)
    else:
        half = tl.arange(0, COLUMNS // 2)
        mask = (r[:, None] < height) & (half[None, :] * 2 < left)
        pair = tl.load(data + line // 2 + half[None, :], mask=mask, other=0).to(tl.int32)
        code = tl.reshape(tl.join(pair & 15, pair >> 4), (ROWS, COLUMNS))
    by_row = tl.load(_at(table, row, 4).to(tl.pointer_type(tl.float32)) + r, mask=r < height, other=1.0)
    by_column = tl.load(_at(table, row, 5).to(tl.pointer_type(tl.float32)) + c0 + c, mask=c < left, other=1.0)
    two = read_values(values2, code, TWO) * tl.minimum(by_row[:, None], by_column[None, :])
    ok = magnitude(g) < 0x7F800000
    g = tl.where(ok, g, 0.0)
    if DECAY and RULE != 0:
        p = _floats(_at(table, row, 0), line, c[None, :], inside, DTYPE, ALIGNED)
        if WEIGHTS == 2:
            beside = _at(table, row, 8).to(tl.pointer_type(tl.int8))
            p = _joined(p, tl.load(beside + line + c[None, :], mask=inside, other=0).to(tl.int32))
        g = decayed(p, g, wd, RULE, FORMS, DECAY)
    bits = magnitude(second(g, two, b2, a2, initial, RULE, FORMS, FIRST))
    bits = tl.where(ok & inside & (bits < 0x7F800000), bits, 0)
    rows = _at(table, row, 6).to(tl.pointer_type(tl.int32))
    columns = _at(table, row, 7).to(tl.pointer_type(tl.int32))
    tl.atomic_max(rows + r, tl.max(bits, 1), mask=r < height, sem="relaxed")
    tl.atomic_max(columns + c0 + c, tl.max(bits, 0), mask=c < left, sem="relaxed")


@triton.jit
def factors_kernel(table, work, ZERO: tl.constexpr, TILE: tl.constexpr):
    """Maxima into a state's factors: of columns those behind ``height``."""
    row = tl.load(work + tl.program_id(0) * 2).to(tl.int64)
    at = tl.load(work + tl.program_id(0) * 2 + 1) * TILE + tl.arange(0, TILE)
    width = _at(table, row, 10).to(tl.int32)
    height = (_at(table, row, 9) // width).to(tl.int32)
    x = tl.load(_at(table, row, 6).to(tl.pointer_type(tl.float32)) + at, mask=at < height + width, other=0.0)
    if ZERO:
        x = divisor(x)
    tl.store(_at(table, row, 4).to(tl.pointer_type(tl.float32)) + at, x, mask=at < height)
    behind = _at(table, row, 5).to(tl.pointer_type(tl.float32)) + (at - height)
    tl.store(behind, x, mask=(at >= height) & (at < height + width))
