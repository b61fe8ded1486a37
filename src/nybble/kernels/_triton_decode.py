"""Codes and scales to float32 inside Triton kernels; every function is exact."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

LINEAR, E2M1, TABLE = (tl.constexpr(v) for v in range(3))
PLAIN, E4M3, E8M0 = (tl.constexpr(v) for v in range(3))


@triton.jit
def codes_of(w0, w1, w2, AT: tl.constexpr, BITS: tl.constexpr):
    """Code AT of a unit: 32 bits, or with 3 bits a code 96."""
    bit: tl.constexpr = BITS * AT
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
def in_place(w0, w1, w2, AT: tl.constexpr, BITS: tl.constexpr, FLIP: tl.constexpr, BASE: tl.constexpr):
    """float32 of code AT of LINEAR times 2 to the place in its word, which is below 20: nothing is shifted."""
    bit: tl.constexpr = BITS * AT
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
def scales_of(
    ptr,
    table_ptr,
    outer_ptr,
    add_ptr,
    index,
    mask,
    outer_block,
    SCALE: tl.constexpr,
    OUTER: tl.constexpr,
    ADD: tl.constexpr,
):
    """float32 of stored scales: as they are, or codes of 8 bits, times an outer scale, plus one number."""
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
        if ADD:
            scale = scale + tl.load(add_ptr)
    return scale
