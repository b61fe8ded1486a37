"""Codes and scales to float32 inside Triton kernels; every function is exact."""

from __future__ import annotations

import triton
import triton.language as tl

LINEAR, E2M1, TABLE = (tl.constexpr(v) for v in range(3))
PLAIN, E4M3, E8M0, LOOKED_UP = (tl.constexpr(v) for v in range(4))


@triton.jit
def codes_of(w0, w1, w2, I: tl.constexpr, BITS: tl.constexpr):
    """Code I of a unit: 32 bits, or with 3 bits a code 96."""
    bit: tl.constexpr = BITS * I
    at: tl.constexpr = bit % 32
    mask: tl.constexpr = (1 << BITS) - 1
    if bit < 32:
        low, high = w0, w1
    elif bit < 64:
        low, high = w1, w2
    else:
        low, high = w2, w2
    if at + BITS > 32:
        return ((low >> at) | (high << (32 - at))) & mask
    return (low >> at) & mask


@triton.jit
def reversed_code(w0, w1, w2, J: tl.constexpr, BITS: tl.constexpr, C: tl.constexpr):
    """The code of a unit that belongs to number J of :func:`phases`."""
    low: tl.constexpr = (J & 1) * (C >> 1) + (J >> 1 & 1) * (C >> 2) + (J >> 2 & 1) * (C >> 3)
    high: tl.constexpr = (J >> 3 & 1) * (C >> 4) + (J >> 4 & 1) * (C >> 5)
    return codes_of(w0, w1, w2, low + high, BITS)


@triton.jit
def in_place(w0, w1, w2, I: tl.constexpr, BITS: tl.constexpr, FLIP: tl.constexpr, BASE: tl.constexpr):
    """float32 of code I of LINEAR times 2 to the place in its word, which is below 20: nothing is shifted."""
    bit: tl.constexpr = BITS * I
    at: tl.constexpr = bit % 32
    word = w0 if bit < 32 else (w1 if bit < 64 else w2)
    bits = (word & (((1 << BITS) - 1) << at)) ^ ((FLIP << at) | 0x4B000000)
    return bits.to(tl.float32, bitcast=True) - (8388608.0 - BASE * (1 << at))


@triton.jit
def values_of(code, table_ptr, KIND: tl.constexpr, FLIP: tl.constexpr, BASE: tl.constexpr):
    """float32 of uint32 codes."""
    if KIND == LINEAR:  # 2^23 + code, less that: no conversion's slow instruction
        number = ((code ^ FLIP) | 0x4B000000).to(tl.float32, bitcast=True)
        return number - (8388608.0 - BASE)
    elif KIND == E2M1:  # its exponent and mantissa where float32 has them, 2^126 too small
        bits = ((code & 8) << 28) | ((code & 7) << 22)
        return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37
    else:
        return tl.load(table_ptr + code.to(tl.int32))


@triton.jit
def scales_of(ptr, table_ptr, outer_ptr, index, mask, outer_block, add, SCALE: tl.constexpr, OUTER: tl.constexpr):
    """float32 of stored scales: as they are, or codes of 8 bits, times an outer scale, plus ``add``."""
    stored = tl.load(ptr + index, mask=mask, other=0)
    if SCALE == PLAIN:
        scale = stored.to(tl.float32)
    else:
        code = stored.to(tl.uint32)
        if SCALE == E4M3:
            bits = ((code & 128) << 24) | ((code & 127) << 20)
            scale = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
            scale = tl.where((code & 127) == 127, float("nan"), scale)
        elif SCALE == E8M0:
            bits = tl.where(code == 0, 0x00400000, tl.where(code == 255, 0x7FC00000, code << 23))
            scale = bits.to(tl.uint32).to(tl.float32, bitcast=True)
        else:
            scale = tl.load(table_ptr + code.to(tl.int32))
        if OUTER == 1:
            scale = scale * tl.load(outer_ptr)
        elif OUTER == 2:
            scale = scale * tl.load(outer_ptr + index // outer_block, mask=mask, other=0)
        if LOOKED_UP == SCALE:
            scale = scale + add
    return scale


@triton.jit
def phases2(x, A: tl.constexpr, B: tl.constexpr):
    return tl.split(tl.reshape(x, (A, B, 2)))


@triton.jit
def phases8(x, A: tl.constexpr, B: tl.constexpr):
    """[A, 8 B] -> 8 of [A, B]; number j holds the columns ``8 b + reversed bits of j``."""
    x0, x1 = phases2(x, A, 4 * B)
    x00, x01 = phases2(x0, A, 2 * B)
    x10, x11 = phases2(x1, A, 2 * B)
    a, b = phases2(x00, A, B)
    c, d = phases2(x01, A, B)
    e, f = phases2(x10, A, B)
    g, h = phases2(x11, A, B)
    return a, b, c, d, e, f, g, h


@triton.jit
def phases16(x, A: tl.constexpr, B: tl.constexpr):
    x0, x1 = phases2(x, A, 8 * B)
    return phases8(x0, A, B) + phases8(x1, A, B)


@triton.jit
def phases(x, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    """[A, C B] -> C of [A, B], for C of 8, 16 and 32."""
    if C == 8:
        return phases8(x, A, B)
    elif C == 16:
        return phases16(x, A, B)
    else:
        x0, x1 = phases2(x, A, 16 * B)
        return phases16(x0, A, B) + phases16(x1, A, B)
