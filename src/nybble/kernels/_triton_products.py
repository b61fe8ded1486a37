"""Products of packed weights in Triton: one row of x, several rows, and W by itself.

A *unit* is what of a row of codes fills whole 32-bit words: 32 bits (or three times that with codes of 3 bits). Code i
of the units of a tile multiplies the columns i, i + C, i + 2 C ... of x: nothing that is decoded is ever moved.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from nybble.kernels._triton_decode import E2M1, LINEAR, codes_of, in_place, scales_of, values_of


@triton.jit
def _words(codes_ptr, rows, units, mask, row_units, UNIT: tl.constexpr):
    """The words of units of rows, as uint32 [rows, units]; the last two are the first where a unit is one word."""
    at = codes_ptr + rows[:, None].to(tl.int64) * (row_units * UNIT) + units[None, :] * UNIT
    w0 = tl.load(at, mask=mask, other=0).to(tl.uint32, bitcast=True)
    if UNIT == 1:
        return w0, w0, w0
    w1 = tl.load(at + 1, mask=mask, other=0).to(tl.uint32, bitcast=True)
    w2 = tl.load(at + 2, mask=mask, other=0).to(tl.uint32, bitcast=True)
    return w0, w1, w2


@triton.jit
def _indices(
    rows, start, end, across: tl.constexpr, share: tl.constexpr, group: tl.constexpr, C: tl.constexpr, BN: tl.constexpr,
    BU: tl.constexpr,
):  # fmt: skip
    """Of the blocks of a tile of units, [rows, blocks], and which are there; [rows, units] where blocks don't fit."""
    if across == 1:
        blocks = tl.zeros((1,), tl.int32)
    elif group % (BU * C) == 0:
        blocks = start * C // group + tl.zeros((1,), tl.int32)
    elif (BU * C) % group == 0:
        blocks = start * C // group + tl.arange(0, BU * C // group)
    else:
        units = start + tl.arange(0, BU)
        blocks = tl.where(units < end, units * C // group, across)
    return (rows[:, None] // share) * across + blocks[None, :], (blocks < across)[None, :]


@triton.jit
def _spread(values, BN: tl.constexpr, BU: tl.constexpr):
    """[rows, blocks] -> [rows, units], or [rows, 1] of one block."""
    if values.shape[1] != 1 and values.shape[1] != BU:
        each: tl.constexpr = BU // values.shape[1]
        values = tl.reshape(tl.broadcast_to(values[:, :, None], (BN, values.shape[1], each)), (BN, BU))
    return values  # the only return: Triton wants the types of several to agree, those of ways not taken too


@triton.jit
def _side(ptr, index, mask):
    return tl.load(ptr + index, mask=mask, other=0).to(tl.float32)


@triton.jit
def one_row(
    x_ptr, codes_ptr, table_ptr, scale_ptr, scale_table_ptr, outer_ptr, add_ptr,
    zero_ptr, offset_ptr, bias_ptr, out_ptr,
    n, outer_block, across: tl.constexpr, share: tl.constexpr, group: tl.constexpr, row_units: tl.constexpr,
    BITS: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr, KIND: tl.constexpr, FLIP: tl.constexpr,
    BASE: tl.constexpr, SCALE: tl.constexpr, OUTER: tl.constexpr, ADD: tl.constexpr, ZERO: tl.constexpr,
    OFFSET: tl.constexpr, BIAS: tl.constexpr, BN: tl.constexpr, BU: tl.constexpr,
):  # fmt: skip
    """Out [n] = W x: products and sums of float32, each row's by one program."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    row_mask = rows < n
    total = tl.zeros((BN, BU), tl.float32)
    shift: tl.constexpr = 1.1529215046068470e18 if KIND == E2M1 else 1.0  # 2^60: see below
    back: tl.constexpr = 8.507059173023462e37 / shift if KIND == E2M1 else 1.0
    for start in range(0, row_units, BU):
        units = start + tl.arange(0, BU)
        unit_mask = units < row_units
        mask = row_mask[:, None] & unit_mask[None, :]
        w0, w1, w2 = _words(codes_ptr, rows, units, mask, row_units, UNIT)
        index, there = _indices(rows, start, row_units, across, share, group, C, BN, BU)
        there = there & row_mask[:, None]
        scale = scales_of(scale_ptr, scale_table_ptr, outer_ptr, add_ptr, index, there, outer_block, SCALE, OUTER, ADD)
        part = tl.zeros((BN, BU), tl.float32)
        sums = tl.zeros((BU,), tl.float32)
        for i in tl.static_range(C):
            xi = tl.load(x_ptr + units * C + i, mask=unit_mask, other=0).to(tl.float32)
            if ZERO or OFFSET:
                sums += xi
            if KIND == LINEAR and BITS * i % 32 + BITS <= 23:  # the code stays where it is, 2^at too large
                part += in_place(w0, w1, w2, i, BITS, FLIP, BASE) * (xi * 2.0 ** -(BITS * i % 32))[None, :]
            elif KIND == E2M1:  # exponent and mantissa as float32 has them, 2^126 too small: x grows, sums grow back
                code = codes_of(w0, w1, w2, i, BITS)
                bits = ((code & 8) << 28) | ((code & 7) << 22)
                part += bits.to(tl.float32, bitcast=True) * (xi * shift)[None, :]
            else:
                part += values_of(codes_of(w0, w1, w2, i, BITS), table_ptr, KIND, FLIP, BASE) * xi[None, :]
        part = part * back
        if ZERO:
            part -= _spread(_side(zero_ptr, index, there), BN, BU) * sums[None, :]
        total += part * _spread(scale, BN, BU)
        if OFFSET:
            total += _spread(_side(offset_ptr, index, there), BN, BU) * sums[None, :]
    y = tl.sum(total, 1)
    if BIAS:
        y += tl.load(bias_ptr + rows, mask=row_mask, other=0).to(tl.float32)
    tl.store(out_ptr + rows, y.to(out_ptr.dtype.element_ty), mask=row_mask)


@triton.jit
def rows_of(
    x_ptr, codes_ptr, table_ptr, scale_ptr, scale_table_ptr, outer_ptr, add_ptr,
    zero_ptr, offset_ptr, bias_ptr, out_ptr,
    m, n, outer_block, across: tl.constexpr, share: tl.constexpr, group: tl.constexpr, row_units: tl.constexpr,
    STEPS: tl.constexpr,
    BITS: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr, KIND: tl.constexpr, FLIP: tl.constexpr,
    BASE: tl.constexpr, SCALE: tl.constexpr, OUTER: tl.constexpr, ADD: tl.constexpr, ZERO: tl.constexpr,
    OFFSET: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BU: tl.constexpr,
):  # fmt: skip
    """Out [parts, m, n] = x W^T over parts of the columns: W is rounded to the dtype of x, sums are float32.

    x is [C, m, k / C]: the columns i, i + C ... that code i of the units multiplies. The bias comes with
    the first part.
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    lines = tl.program_id(1) * BM + tl.arange(0, BM)
    part = tl.program_id(2)
    row_mask, line_mask = rows < n, lines < m
    first = part * (STEPS * BU)
    end = tl.minimum(row_units, first + STEPS * BU)
    total = tl.zeros((BM, BN), tl.float32)
    for step in range(STEPS):
        start = first + step * BU
        units = start + tl.arange(0, BU)
        mask = row_mask[:, None] & (units < end)[None, :]
        w0, w1, w2 = _words(codes_ptr, rows, units, mask, row_units, UNIT)
        index, there = _indices(rows, start, row_units, across, share, group, C, BN, BU)
        there = there & row_mask[:, None]
        scale = scales_of(scale_ptr, scale_table_ptr, outer_ptr, add_ptr, index, there, outer_block, SCALE, OUTER, ADD)
        scale = _spread(scale, BN, BU)
        if ZERO:
            zero = _spread(_side(zero_ptr, index, there), BN, BU)
        if OFFSET:
            offset = _spread(_side(offset_ptr, index, there), BN, BU)
        x_mask = line_mask[:, None] & (units < end)[None, :]
        for i in tl.static_range(C):
            x = tl.load(x_ptr + (i * m + lines)[:, None] * row_units + units[None, :], mask=x_mask, other=0)
            code = codes_of(w0, w1, w2, i, BITS)
            value = values_of(code, table_ptr, KIND, FLIP, BASE)
            if ZERO:
                value = value - zero
            value = value * scale
            if OFFSET:
                value = value + offset
            total = tl.dot(x, tl.trans(value.to(x.dtype)), total)
    if BIAS and part == 0:
        total += tl.load(bias_ptr + rows, mask=row_mask, other=0).to(tl.float32)[None, :]
    at = out_ptr + part.to(tl.int64) * m * n + lines[:, None].to(tl.int64) * n + rows[None, :]
    tl.store(at, total.to(out_ptr.dtype.element_ty), mask=line_mask[:, None] & row_mask[None, :])


@triton.jit
def added(parts_ptr, out_ptr, count, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Out [count] = the sum of float32 parts, in their order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts_ptr + part * count + at, mask=mask, other=0)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def expanded(
    codes_ptr, table_ptr, scale_ptr, scale_table_ptr, outer_ptr, add_ptr, zero_ptr, offset_ptr, out_ptr,
    first, n, k, size, outer_block, across: tl.constexpr, share: tl.constexpr, group: tl.constexpr,
    BITS: tl.constexpr, SCALE: tl.constexpr, OUTER: tl.constexpr, ADD: tl.constexpr, ZERO: tl.constexpr,
    OFFSET: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Out [n, k] = rows of W from ``first`` on, of any number of columns and bits: a code is in two bytes."""
    lines = tl.program_id(0) * BN + tl.arange(0, BN)
    columns = tl.program_id(1) * BK + tl.arange(0, BK)
    mask = (lines < n)[:, None] & (columns < k)[None, :]
    rows = (first + lines).to(tl.int64)
    bit = (rows[:, None] * k + columns[None, :]) * BITS
    at = bit // 8
    low = tl.load(codes_ptr + at, mask=mask, other=0).to(tl.uint32)
    high = tl.load(codes_ptr + at + 1, mask=mask & (at + 1 < size), other=0).to(tl.uint32)
    code = ((low | (high << 8)) >> (bit % 8).to(tl.uint32)) & (2**BITS - 1)
    value = tl.load(table_ptr + code.to(tl.int32))
    index = (rows[:, None] // share) * across + (columns // group)[None, :]
    if ZERO:
        value -= _side(zero_ptr, index, mask)
    value = value * scales_of(
        scale_ptr, scale_table_ptr, outer_ptr, add_ptr, index, mask, outer_block, SCALE, OUTER, ADD
    )
    if OFFSET:
        value += _side(offset_ptr, index, mask)
    tl.store(
        out_ptr + lines[:, None].to(tl.int64) * k + columns[None, :], value.to(out_ptr.dtype.element_ty), mask=mask
    )


@triton.jit
def expanded_units(
    codes_ptr, table_ptr, scale_ptr, scale_table_ptr, outer_ptr, add_ptr, zero_ptr, offset_ptr, out_ptr,
    first, n, outer_block, across: tl.constexpr, share: tl.constexpr, group: tl.constexpr,
    row_units: tl.constexpr,
    BITS: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr, KIND: tl.constexpr, FLIP: tl.constexpr,
    BASE: tl.constexpr, SCALE: tl.constexpr, OUTER: tl.constexpr, ADD: tl.constexpr, ZERO: tl.constexpr,
    OFFSET: tl.constexpr, BN: tl.constexpr, BU: tl.constexpr,
):  # fmt: skip
    """As :func:`expanded` where rows are whole units: each word is read once, and C values are written side by side."""
    lines = tl.program_id(0) * BN + tl.arange(0, BN)
    units = tl.program_id(1) * BU + tl.arange(0, BU)
    mask = (lines < n)[:, None] & (units < row_units)[None, :]
    rows = first + lines
    w0, w1, w2 = _words(codes_ptr, rows, units, mask, row_units, UNIT)
    index = (rows[:, None] // share) * across + (units * C // group)[None, :]
    scale = scales_of(scale_ptr, scale_table_ptr, outer_ptr, add_ptr, index, mask, outer_block, SCALE, OUTER, ADD)[
        :, :, None
    ]
    places = tl.arange(0, C).to(tl.uint32)[None, None, :]
    if UNIT == 1:
        code = (w0[:, :, None] >> (places * BITS)) & (2**BITS - 1)
    else:  # 3 bits: the word where a code begins, and the one behind it
        bit = places * BITS
        low = tl.where(bit < 32, w0[:, :, None], tl.where(bit < 64, w1[:, :, None], w2[:, :, None]))
        high = tl.where(bit < 32, w1[:, :, None], w2[:, :, None])
        at = bit % 32
        code = ((low >> at) | tl.where(at + BITS > 32, high << (32 - at), 0)) & (2**BITS - 1)
    value = values_of(code, table_ptr, KIND, FLIP, BASE)
    if ZERO:
        value -= _side(zero_ptr, index, mask)[:, :, None]
    value = value * scale
    if OFFSET:
        value += _side(offset_ptr, index, mask)[:, :, None]
    at3 = (
        lines[:, None, None].to(tl.int64) * (row_units * C) + units[None, :, None] * C + tl.arange(0, C)[None, None, :]
    )
    tl.store(out_ptr + at3, value.to(out_ptr.dtype.element_ty), mask=mask[:, :, None])
