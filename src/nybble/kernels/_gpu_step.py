# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""The Triton kernels of an optimizer's step: all tensors of a launch, one program for each tile of one of them.

A table has a row of addresses and sizes for each tensor, and a list of tiles says whose turn it is. States of rows and
columns take two passes: their maxima first, by which codes are then found.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nybble.kernels import _gpu_states as states
from nybble.kernels._gpu_blocks import divisor, magnitude
from nybble.kernels._gpu_rules import HOST, decayed, second, updated
from nybble.kernels._gpu_states import (
    codes_over,
    place,
    read_codes,
    read_scales,
    read_values,
    spread,
    tops,
    write_codes,
    write_scales,
)

(
    P, CODES1, SCALE1, CODES2, SCALE2, COLUMNS2, TOP_ROWS, TOP_COLUMNS, RESIDUAL, COUNT, WIDTH, ASIDE, ROW,
) = (tl.constexpr(field) for field in range(13))  # fmt: skip
"""Of a row of the table: addresses of the parameter, of codes (or of a state in float32) and scales, of factors by
columns, of both raw maxima, of the residual; elements, columns; address of the count of what was set aside; ROW: how
many there are."""
FLOAT32, BFLOAT16, FLOAT16 = (tl.constexpr(dtype) for dtype in range(3))
NEAREST, STOCHASTIC, RESIDUAL8 = (tl.constexpr(way) for way in range(3))
ABSENT, WIDE, BLOCKS = (tl.constexpr(kind) for kind in (states.ABSENT, states.WIDE, states.BLOCKS))


@triton.jit
def _at(table, row, FIELD: tl.constexpr):
    return tl.load(table + row * ROW + FIELD)


@triton.jit
def _floats(pointer, at, inside, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """float32, of a parameter or gradient."""
    if DTYPE == FLOAT32:
        data = pointer.to(tl.pointer_type(tl.float32))
        if ALIGNED:
            data = tl.multiple_of(data, 16)
        x = tl.load(data + at, mask=inside, other=0.0)
    else:
        data = pointer.to(tl.pointer_type(tl.int16))
        if ALIGNED:
            data = tl.multiple_of(data, 16)
        bits = tl.load(data + at, mask=inside, other=0)
        if DTYPE == BFLOAT16:
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
def _write(table, row, draws, at, inside, p, DTYPE: tl.constexpr, WEIGHTS: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = _at(table, row, P)
    if DTYPE == FLOAT32:
        data = pointer.to(tl.pointer_type(tl.float32))
        if ALIGNED:
            data = tl.multiple_of(data, 16)
        tl.store(data + at, p, mask=inside)
    else:
        data = pointer.to(tl.pointer_type(tl.int16))
        if ALIGNED:
            data = tl.multiple_of(data, 16)
        if DTYPE == FLOAT16:
            bits = p.to(tl.float16).to(tl.int16, bitcast=True)
        elif WEIGHTS == NEAREST:
            bits = _to_bfloat16(p)
        elif WEIGHTS == STOCHASTIC:
            random = tl.load(draws.to(tl.pointer_type(tl.int32)) + at, mask=inside, other=0)
            moved = ((p.to(tl.int32, bitcast=True) + random) & -65536).to(tl.float32, bitcast=True)
            bits = _to_bfloat16(tl.where(magnitude(p) < 0x7F800000, moved, p))
        else:
            high, residual = _split(p)
            bits = high.to(tl.int16)
            tl.store(_at(table, row, RESIDUAL).to(tl.pointer_type(tl.int8)) + at, residual.to(tl.int8), mask=inside)
        tl.store(data + at, bits, mask=inside)


@triton.jit
def _factors(rows, columns, chunk, width, at, inside, ZERO: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr):
    """An element's factors of its row and of its column; ZERO: one of 0 counts as 1."""
    rows, columns = rows.to(tl.pointer_type(tl.float32)), columns.to(tl.pointer_type(tl.float32))
    if COLUMNS == 0:
        row = at // width
        by_row = tl.load(rows + row, mask=inside, other=1.0)
        by_column = tl.load(columns + (at - row * width), mask=inside, other=1.0)
    else:
        ROWS: tl.constexpr = TILE // COLUMNS
        across = width // COLUMNS
        r = chunk // across * ROWS + tl.arange(0, ROWS)
        c = chunk % across * COLUMNS + tl.arange(0, COLUMNS)
        first = tl.max(tl.reshape(inside.to(tl.int32), (ROWS, COLUMNS)), 1) > 0
        by_row = spread(tl.load(rows + r, mask=first, other=1.0), COLUMNS, TILE)
        by_column = tl.reshape(tl.broadcast_to(tl.load(columns + c)[None, :], (ROWS, COLUMNS)), (TILE,))
    if ZERO:
        by_row, by_column = divisor(by_row), divisor(by_column)
    return tl.minimum(by_row, by_column)


@triton.jit
def _decoded(
    table, row, chunk, count, width, at, inside, values, META: tl.constexpr, CODES: tl.constexpr, TILE: tl.constexpr,
    COLUMNS: tl.constexpr, SHORT: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """A state, float32."""
    KIND: tl.constexpr = META[0]
    if KIND == ABSENT:
        return tl.zeros((TILE,), tl.float32)
    elif KIND == WIDE:
        return tl.load(_at(table, row, CODES).to(tl.pointer_type(tl.float32)) + at, mask=inside, other=0.0)
    else:
        code = read_codes(_at(table, row, CODES), chunk, count, width, META[1], TILE, COLUMNS, ALIGNED)
        x = read_values(values, code, META)
        if SHORT:  # code 0 is no 0
            x = tl.where(inside, x, 0.0)
        if KIND == BLOCKS:
            return x * read_scales(_at(table, row, CODES + 1), chunk, count, width, META[2], TILE, COLUMNS, ALIGNED)
        else:
            rows, columns = _at(table, row, SCALE2), _at(table, row, COLUMNS2)
            return x * _factors(rows, columns, chunk, width, at, inside, False, TILE, COLUMNS)


@triton.jit
def _top(x, META: tl.constexpr, TILE: tl.constexpr):
    """Bits of the largest magnitudes: of each block, or of all."""
    if META[0] == BLOCKS:
        return tops(x, META[2], TILE)
    else:
        return tl.max(magnitude(x), 0)


@triton.jit
def _finite(top, META: tl.constexpr):
    """Whether what has these :func:`_top` is finite."""
    if META[0] == BLOCKS:
        return tl.max(top, 0) < 0x7F800000
    else:
        return top < 0x7F800000


@triton.jit
def _encoded(
    table, row, chunk, count, width, at, inside, x, top, thresholds, values, codes, META: tl.constexpr,
    CODES: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    KIND: tl.constexpr = META[0]
    if KIND == WIDE:
        tl.store(_at(table, row, CODES).to(tl.pointer_type(tl.float32)) + at, x, mask=inside)
    elif KIND > WIDE:
        if KIND == BLOCKS:
            scale = write_scales(_at(table, row, CODES + 1), chunk, count, width, top, META, TILE, COLUMNS)
        else:
            rows, columns = _at(table, row, TOP_ROWS), _at(table, row, TOP_COLUMNS)
            scale = _factors(rows, columns, chunk, width, at, inside, META[5], TILE, COLUMNS)
        found = codes_over(x, scale, thresholds, values, codes, META, KIND == BLOCKS, TILE)
        write_codes(_at(table, row, CODES), chunk, count, width, found, inside, META[1], TILE, COLUMNS, ALIGNED)


@triton.jit
def step_kernel(
    table, given, work, values1, thresholds1, codes1, values2, thresholds2, codes2,
    rate, shrink, wd, b1, a1, b2, a2, root, inverse, eps, initial,
    RULE: tl.constexpr, FORMS: tl.constexpr, ONE: tl.constexpr, TWO: tl.constexpr, DTYPE: tl.constexpr,
    GRADIENT: tl.constexpr, WEIGHTS: tl.constexpr, GUARD: tl.constexpr, DECAY: tl.constexpr, FIRST: tl.constexpr,
    NESTEROV: tl.constexpr, ALIGNED: tl.constexpr, COLUMNS: tl.constexpr, SHORT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One tile of one tensor; ``given`` has the addresses of gradients and of random numbers."""
    HELD: tl.constexpr = ONE[0] > ABSENT
    row = tl.load(work + tl.program_id(0) * 2).to(tl.int64)
    chunk = tl.load(work + tl.program_id(0) * 2 + 1).to(tl.int64)
    count, width = _at(table, row, COUNT), _at(table, row, WIDTH)
    at, inside = place(chunk, count, width, 1, TILE, COLUMNS, ALIGNED)
    g = _floats(tl.load(given + row * 2), at, inside, GRADIENT, ALIGNED)
    before = _floats(_at(table, row, P), at, inside, DTYPE, ALIGNED)
    if WEIGHTS == RESIDUAL8:
        beside = _at(table, row, RESIDUAL).to(tl.pointer_type(tl.int8))
        before = _joined(before, tl.load(beside + at, mask=inside, other=0).to(tl.int32))
    m = _decoded(table, row, chunk, count, width, at, inside, values1, ONE, CODES1, TILE, COLUMNS, SHORT, ALIGNED)
    v = _decoded(table, row, chunk, count, width, at, inside, values2, TWO, CODES2, TILE, COLUMNS, SHORT, ALIGNED)
    p, one, two = updated(
        before, g, m, v, rate, shrink, wd, b1, a1, b2, a2, root, inverse, eps, initial, RULE, FORMS, DECAY, FIRST,
        NESTEROV, HELD,
    )  # fmt: skip
    top1, top2 = _top(one, ONE, TILE), _top(two, TWO, TILE)
    if GUARD:  # noqa: SIM102 - compiled in; a gradient that isn't finite makes a state that isn't
        if (_finite(top1, ONE) & _finite(top2, TWO)) == 0:
            ok = magnitude(g) < 0x7F800000
            p, one, two = updated(
                before, tl.where(ok, g, 0.0), m, v, rate, shrink, wd, b1, a1, b2, a2, root, inverse, eps, initial,
                RULE, FORMS, DECAY, FIRST, NESTEROV, HELD,
            )  # fmt: skip
            ok = ok & (magnitude(one) < 0x7F800000) & (magnitude(two) < 0x7F800000)
            one, two, p = tl.where(ok, one, 0.0), tl.where(ok, two, 0.0), tl.where(ok, p, before)
            top1, top2 = _top(one, ONE, TILE), _top(two, TWO, TILE)
            aside = tl.sum((inside & (ok == 0)).to(tl.int32), 0)
            tl.atomic_add(_at(table, row, ASIDE).to(tl.pointer_type(tl.int32)), aside)
    _write(table, row, tl.load(given + row * 2 + 1), at, inside, p, DTYPE, WEIGHTS, ALIGNED)
    _encoded(
        table, row, chunk, count, width, at, inside, one, top1, thresholds1, values1, codes1, ONE, CODES1, TILE,
        COLUMNS, ALIGNED,
    )  # fmt: skip
    _encoded(
        table, row, chunk, count, width, at, inside, two, top2, thresholds2, values2, codes2, TWO, CODES2, TILE,
        COLUMNS, ALIGNED,
    )  # fmt: skip


@triton.jit
def maxima_kernel(
    table, given, work, values2, wd, b2, a2, initial,
    RULE: tl.constexpr, FORMS: tl.constexpr, TWO: tl.constexpr, DTYPE: tl.constexpr, GRADIENT: tl.constexpr,
    WEIGHTS: tl.constexpr, DECAY: tl.constexpr, FIRST: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, RECTANGLE: tl.constexpr,
):  # fmt: skip
    """The largest new second state of each row and of each column, as bits: of one rectangle of one matrix.

    RECTANGLE: its columns, below 0 where not all fit.
    """
    TILE: tl.constexpr = ROWS * COLUMNS
    row = tl.load(work + tl.program_id(0) * 2).to(tl.int64)
    chunk = tl.load(work + tl.program_id(0) * 2 + 1).to(tl.int64)
    count, width = _at(table, row, COUNT), _at(table, row, WIDTH)
    at, inside = place(chunk, count, width, 1, TILE, RECTANGLE, ALIGNED)
    g = _floats(tl.load(given + row * 2), at, inside, GRADIENT, ALIGNED)
    code = read_codes(_at(table, row, CODES2), chunk, count, width, TWO[1], TILE, RECTANGLE, ALIGNED)
    across = tl.cdiv(width, COLUMNS)
    r = chunk // across * ROWS + tl.arange(0, ROWS)
    c = chunk % across * COLUMNS + tl.arange(0, COLUMNS)
    lines, columns = r * width < count, c < width
    by_row = tl.load(_at(table, row, SCALE2).to(tl.pointer_type(tl.float32)) + r, mask=lines, other=1.0)
    by_column = tl.load(_at(table, row, COLUMNS2).to(tl.pointer_type(tl.float32)) + c, mask=columns, other=1.0)
    by = tl.minimum(
        tl.broadcast_to(by_row[:, None], (ROWS, COLUMNS)), tl.broadcast_to(by_column[None, :], (ROWS, COLUMNS))
    )
    two = read_values(values2, code, TWO) * tl.reshape(by, (TILE,))
    ok = inside & (magnitude(g) < 0x7F800000)
    g = tl.where(ok, g, 0.0)
    if DECAY and RULE != 0:
        p = _floats(_at(table, row, P), at, inside, DTYPE, ALIGNED)
        if WEIGHTS == RESIDUAL8:
            beside = _at(table, row, RESIDUAL).to(tl.pointer_type(tl.int8))
            p = _joined(p, tl.load(beside + at, mask=inside, other=0).to(tl.int32))
        g = decayed(p, g, wd, RULE, FORMS, DECAY)
    bits = magnitude(second(g, two, b2, a2, initial, RULE, FORMS, FIRST))
    bits = tl.reshape(tl.where(ok & (bits < 0x7F800000), bits, 0), (ROWS, COLUMNS))
    top_rows = _at(table, row, TOP_ROWS).to(tl.pointer_type(tl.int32))
    top_columns = _at(table, row, TOP_COLUMNS).to(tl.pointer_type(tl.int32))
    tl.atomic_max(top_rows + r, tl.max(bits, 1), mask=lines, sem="relaxed")
    tl.atomic_max(top_columns + c, tl.max(bits, 0), mask=columns, sem="relaxed")


@triton.jit
def factors_kernel(table, work, ZERO: tl.constexpr, TILE: tl.constexpr):
    """Maxima into a state's factors: of columns those behind ``height``."""
    row = tl.load(work + tl.program_id(0) * 2).to(tl.int64)
    at = tl.load(work + tl.program_id(0) * 2 + 1) * TILE + tl.arange(0, TILE)
    width = _at(table, row, WIDTH).to(tl.int32)
    height = (_at(table, row, COUNT) // width).to(tl.int32)
    x = tl.load(_at(table, row, TOP_ROWS).to(tl.pointer_type(tl.float32)) + at, mask=at < height + width, other=0.0)
    if ZERO:
        x = divisor(x)
    tl.store(_at(table, row, SCALE2).to(tl.pointer_type(tl.float32)) + at, x, mask=at < height)
    behind = _at(table, row, COLUMNS2).to(tl.pointer_type(tl.float32)) + (at - height)
    tl.store(behind, x, mask=(at >= height) & (at < height + width))
