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
from nybble.kernels._gpu_exact import HOST, spread
from nybble.kernels._gpu_rules import ADAMW, decayed, second, updated
from nybble.kernels._gpu_states import (
    codes_over,
    halves,
    place,
    read_codes,
    read_scales,
    read_values,
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
ABSENT, WIDE, BLOCKS, RANK1 = (tl.constexpr(kind) for kind in (states.ABSENT, states.WIDE, states.BLOCKS, states.RANK1))


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
def _write(pointer, beside, draws, at, inside, p, DTYPE: tl.constexpr, WEIGHTS: tl.constexpr, ALIGNED: tl.constexpr):
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
            tl.store(beside.to(tl.pointer_type(tl.int8)) + at, residual.to(tl.int8), mask=inside)
        tl.store(data + at, bits, mask=inside)


@triton.jit
def _of_columns(columns, c, COLUMNS: tl.constexpr, TILE: tl.constexpr):
    """float32 [TILE]: factors of the columns of a rectangle that begins at column ``c``."""
    found = tl.load(columns.to(tl.pointer_type(tl.float32)) + c + tl.arange(0, COLUMNS))
    return tl.reshape(tl.broadcast_to(found[None, :], (TILE // COLUMNS, COLUMNS)), (TILE,))


@triton.jit
def _factors(rows, columns, by_column, r, left, width, at, inside, TILE: tl.constexpr, COLUMNS: tl.constexpr):
    """An element's factors of its row and of its column; those of the columns of a rectangle are there."""
    rows = rows.to(tl.pointer_type(tl.float32))
    if COLUMNS == 0:
        row = at // width
        by_row = tl.load(rows + row, mask=inside, other=1.0)
        by_column = tl.load(columns.to(tl.pointer_type(tl.float32)) + (at - row * width), mask=inside, other=1.0)
    else:
        k = tl.arange(0, TILE // COLUMNS)
        by_row = spread(tl.load(rows + r + k, mask=k < left, other=1.0), COLUMNS, TILE)
    return by_row, by_column


@triton.jit
def _decoded(
    codes, scale, columns, by_column, r, start, left, width, at, inside, values, META: tl.constexpr,
    TILE: tl.constexpr, COLUMNS: tl.constexpr, SHORT: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """A state, float32."""
    KIND: tl.constexpr = META[0]
    if KIND == ABSENT:
        return tl.zeros((TILE,), tl.float32)
    elif KIND == WIDE:
        return tl.load(codes.to(tl.pointer_type(tl.float32)) + at, mask=inside, other=0.0)
    else:
        x = read_values(values, read_codes(codes, start, left, width, META[1], TILE, COLUMNS, ALIGNED), META)
        if SHORT:  # code 0 is no 0
            x = tl.where(inside, x, 0.0)
        if KIND == BLOCKS:
            return x * read_scales(scale, start, left, width, META[2], TILE, COLUMNS)
        else:
            by_row, by_column = _factors(scale, columns, by_column, r, left, width, at, inside, TILE, COLUMNS)
            return x * tl.minimum(by_row, by_column)


@triton.jit
def _top(x, META: tl.constexpr, OTHER: tl.constexpr, TILE: tl.constexpr):
    """Bits of the largest magnitudes: of each block, of the other state's blocks, or of all."""
    if META[0] == BLOCKS:
        return tops(x, META[2], TILE)
    elif OTHER[0] == BLOCKS:
        return tops(x, OTHER[2], TILE)
    else:
        return tops(x, TILE, TILE)


@triton.jit
def _odd(top, META: tl.constexpr):
    """Whether a state isn't finite, or its scales are so large or small that a quotient takes more care."""
    if META[0] == BLOCKS:
        return (top >= 0x71800000) | ((top > 0) & (top < 0x1C800000))  # 2^100, 2^-70
    else:
        return top >= 0x7F800000


@triton.jit
def _usual(top1, top2, ONE: tl.constexpr, TWO: tl.constexpr):
    """Whether nothing is :func:`_odd`."""
    one, two = _odd(top1, ONE).to(tl.int32), _odd(top2, TWO).to(tl.int32)
    if top1.shape[0] == top2.shape[0]:
        return tl.max(one | two, 0) == 0
    else:
        return (tl.max(one, 0) | tl.max(two, 0)) == 0


@triton.jit
def _finite(top1, top2):
    """Whether both states are finite."""
    return (tl.max(top1, 0) < 0x7F800000) & (tl.max(top2, 0) < 0x7F800000)


@triton.jit
def _encoded(
    state, scale, columns, by_column, r, start, left, width, at, inside, x, top, is_usual, thresholds, values, codes,
    META: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Scales, but of rows and columns, and codes are written."""
    KIND: tl.constexpr = META[0]
    if KIND == WIDE:
        tl.store(state.to(tl.pointer_type(tl.float32)) + at, x, mask=inside)
    elif KIND > WIDE:
        if KIND == BLOCKS:
            by = write_scales(scale, start, left, width, top, META, TILE, COLUMNS)
        else:
            by_row, by_column = _factors(scale, columns, by_column, r, left, width, at, inside, TILE, COLUMNS)
            if META[5]:
                by_row, by_column = divisor(by_row), divisor(by_column)
            by = tl.minimum(by_row, by_column)
        found = codes_over(x, by, is_usual, thresholds, values, codes, META, KIND == BLOCKS, TILE)
        write_codes(state, start, left, width, found, inside, META[1], TILE, COLUMNS, ALIGNED)


@triton.jit
def step_kernel(
    table, given, work, values1, thresholds1, codes1, values2, thresholds2, codes2,
    rate, shrink, wd, b1, a1, b2, a2, root, inverse, eps, initial,
    RULE: tl.constexpr, FORMS: tl.constexpr, ONE: tl.constexpr, TWO: tl.constexpr, DTYPE: tl.constexpr,
    GRADIENT: tl.constexpr, WEIGHTS: tl.constexpr, GUARD: tl.constexpr, DECAY: tl.constexpr, FIRST: tl.constexpr,
    NESTEROV: tl.constexpr, ALIGNED: tl.constexpr, COLUMNS: tl.constexpr, SHORT: tl.constexpr, TILE: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """TILES of one tensor, one after another; ``given`` has the addresses of gradients and of random numbers."""
    HELD: tl.constexpr = ONE[0] > ABSENT
    row = tl.load(work + tl.program_id(0) * 2).to(tl.int64)
    number = tl.load(work + tl.program_id(0) * 2 + 1)
    data, state1, scale1 = _at(table, row, P), _at(table, row, CODES1), _at(table, row, SCALE1)
    state2, scale2, columns2 = _at(table, row, CODES2), _at(table, row, SCALE2), _at(table, row, COLUMNS2)
    top_rows, top_columns = _at(table, row, TOP_ROWS), _at(table, row, TOP_COLUMNS)
    beside, count, width = _at(table, row, RESIDUAL), _at(table, row, COUNT), _at(table, row, WIDTH)
    gradient, draws = tl.load(given + row * 2), tl.load(given + row * 2 + 1)
    r = number * 0
    old, new = r, r
    start, step = number.to(tl.int64) * (TILES * TILE), TILE
    tiles = tl.cdiv(count - start, TILE)
    if COLUMNS > 0:
        across = (width // COLUMNS).to(tl.int32)
        r, c = number // across * (TILES * TILE // COLUMNS), number % across * COLUMNS
        start, step = r * (width // COLUMNS * COLUMNS) + c, width // COLUMNS * TILE
        tiles = tl.cdiv(count // width - r, TILE // COLUMNS)
        if TWO[0] == RANK1:
            old, new = _of_columns(columns2, c, COLUMNS, TILE), _of_columns(top_columns, c, COLUMNS, TILE)
    tiles = tl.minimum(tiles, TILES).to(tl.int32)
    while tiles > 0:
        if COLUMNS > 0:
            left = (count // width).to(tl.int32) - r
        else:
            left = tl.minimum(count - start, TILE).to(tl.int32)
        at, inside = place(start, left, width, 1, TILE, COLUMNS, ALIGNED)
        g = _floats(gradient, at, inside, GRADIENT, ALIGNED)
        before = _floats(data, at, inside, DTYPE, ALIGNED)
        if WEIGHTS == RESIDUAL8:
            residual = tl.load(beside.to(tl.pointer_type(tl.int8)) + at, mask=inside, other=0)
            before = _joined(before, residual.to(tl.int32))
        m = _decoded(
            state1, scale1, columns2, old, r, start, left, width, at, inside, values1, ONE, TILE, COLUMNS, SHORT,
            ALIGNED,
        )  # fmt: skip
        v = _decoded(
            state2, scale2, columns2, old, r, start, left, width, at, inside, values2, TWO, TILE, COLUMNS, SHORT,
            ALIGNED,
        )  # fmt: skip
        p, one, two = updated(
            before, g, m, v, rate, shrink, wd, b1, a1, b2, a2, root, inverse, eps, initial, RULE, FORMS, DECAY, FIRST,
            NESTEROV, HELD,
        )  # fmt: skip
        top1, top2 = _top(one, ONE, TWO, TILE), _top(two, TWO, ONE, TILE)
        is_usual = _usual(top1, top2, ONE, TWO)
        if GUARD:  # noqa: SIM102 - compiled in
            if not is_usual:  # noqa: SIM102 - the one is the other's rare case
                if not _finite(top1, top2):  # a gradient that isn't finite makes a state that isn't
                    ok = magnitude(g) < 0x7F800000
                    p, one, two = updated(
                        before, tl.where(ok, g, 0.0), m, v, rate, shrink, wd, b1, a1, b2, a2, root, inverse, eps,
                        initial, RULE, FORMS, DECAY, FIRST, NESTEROV, HELD,
                    )  # fmt: skip
                    ok = ok & (magnitude(one) < 0x7F800000) & (magnitude(two) < 0x7F800000)
                    one, two, p = tl.where(ok, one, 0.0), tl.where(ok, two, 0.0), tl.where(ok, p, before)
                    top1, top2 = _top(one, ONE, TWO, TILE), _top(two, TWO, ONE, TILE)
                    aside = tl.sum((inside & (ok == 0)).to(tl.int32), 0)
                    tl.atomic_add(_at(table, row, ASIDE).to(tl.pointer_type(tl.int32)), aside)
        _write(data, beside, draws, at, inside, p, DTYPE, WEIGHTS, ALIGNED)
        _encoded(
            state1, scale1, top_columns, new, r, start, left, width, at, inside, one, top1, is_usual, thresholds1,
            values1, codes1, ONE, TILE, COLUMNS, ALIGNED,
        )  # fmt: skip
        _encoded(
            state2, scale2 if TWO[0] == BLOCKS else top_rows, top_columns, new, r, start, left, width, at, inside, two,
            top2, is_usual, thresholds2, values2, codes2, TWO, TILE, COLUMNS, ALIGNED,
        )  # fmt: skip
        start += step
        if COLUMNS > 0:
            r += TILE // COLUMNS
        tiles -= 1


@triton.jit
def maxima_kernel(
    table, given, work, values2, wd, b2, a2, initial,
    RULE: tl.constexpr, FORMS: tl.constexpr, TWO: tl.constexpr, DTYPE: tl.constexpr, GRADIENT: tl.constexpr,
    WEIGHTS: tl.constexpr, DECAY: tl.constexpr, FIRST: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, TILES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The largest new second state of each row and of each column, as bits: of TILES rectangles, each below the last.

    WHOLE: whether COLUMNS divide the width of every matrix.
    """
    row = tl.load(work + tl.program_id(0) * 2).to(tl.int64)
    number = tl.load(work + tl.program_id(0) * 2 + 1)
    data, state = _at(table, row, P), _at(table, row, CODES2)
    rows, columns = _at(table, row, SCALE2), _at(table, row, COLUMNS2)
    top_rows, top_columns = _at(table, row, TOP_ROWS), _at(table, row, TOP_COLUMNS)
    beside, count, width = _at(table, row, RESIDUAL), _at(table, row, COUNT), _at(table, row, WIDTH)
    gradient, height = tl.load(given + row * 2), (count // width).to(tl.int32)
    across = tl.cdiv(width, COLUMNS).to(tl.int32)
    if WHOLE:
        width = across.to(tl.int64) * COLUMNS  # of which the compiler knows what divides it
    r = number // across * (TILES * ROWS) + tl.arange(0, ROWS)
    c = number % across * COLUMNS + tl.arange(0, COLUMNS)
    pairs = number % across * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
    # 0 beyond the matrix, where nothing may be higher
    by_column = tl.load(columns.to(tl.pointer_type(tl.float32)) + c, mask=c < width, other=0.0)
    highest = tl.full((ROWS, COLUMNS), 0x00800000, tl.int32)
    codes = state.to(tl.pointer_type(tl.uint8))
    if ALIGNED and WHOLE:
        codes = tl.multiple_of(codes, 16)
    half = across.to(tl.int64) * (COLUMNS // 2) if WHOLE else width // 2
    tiles = tl.minimum(tl.cdiv(height - number // across * (TILES * ROWS), ROWS), TILES)
    while tiles > 0:
        lines = r < height
        at = (r * width)[:, None] + c[None, :]
        inside, there = lines[:, None] & (c < width)[None, :], lines[:, None] & (pairs * 2 < width)[None, :]
        if WHOLE:
            inside, there = tl.broadcast_to(lines[:, None], at.shape), lines[:, None]
        g = _floats(gradient, at, inside, GRADIENT, ALIGNED and WHOLE)
        found = tl.load(codes + ((r * half)[:, None] + pairs[None, :]), mask=there, other=0)
        by_row = tl.load(rows.to(tl.pointer_type(tl.float32)) + r, mask=lines, other=0.0)
        two = read_values(values2, halves(found.to(tl.int32), TWO[1]), TWO)
        two = two * tl.minimum(tl.broadcast_to(by_row[:, None], at.shape), by_column[None, :])
        if DECAY and RULE != ADAMW:
            p = _floats(data, at, inside, DTYPE, ALIGNED and WHOLE)
            if WEIGHTS == RESIDUAL8:
                residual = tl.load(beside.to(tl.pointer_type(tl.int8)) + at, mask=inside, other=0)
                p = _joined(p, residual.to(tl.int32))
            g = decayed(p, g, wd, RULE, FORMS, DECAY)
        two = second(g, two, b2, a2, initial, RULE, FORMS, FIRST)
        if FIRST:
            two = tl.where(inside, two, 0.0)
        # one above in the exponent: what isn't finite, as it is made by a gradient that isn't, is below all others
        bits = two.to(tl.int32, bitcast=True) + 0x00800000
        highest = tl.maximum(highest, bits)
        most = tl.maximum(tl.max(bits, 1), 0x00800000) - 0x00800000
        tl.atomic_max(top_rows.to(tl.pointer_type(tl.int32)) + r, most, mask=lines, sem="relaxed")
        r += ROWS
        tiles -= 1
    most = tl.max(highest, 0) - 0x00800000
    tl.atomic_max(top_columns.to(tl.pointer_type(tl.int32)) + c, most, mask=c < width, sem="relaxed")


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
