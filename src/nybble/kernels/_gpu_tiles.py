# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Products of two quantized operands on tensor cores: INT8, FP8, or bfloat16 where both are exact in it.

Whole numbers are added up as such. On FP8 units, whose accumulators are narrow, partial sums go to float32 as often as
``PROMOTE`` columns; E2M1's products are whole quarters, of which 64 fit. A weight of 4 bits is read as it lies: for few
rows of x inside the product, where even and odd columns are two products, so that no code changes places; for many
rows it is decoded a part at a time into numbers that stay in the L2 cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nybble.kernels._gpu import INTERPRETED, aligned, shared
from nybble.kernels._gpu_operands import BF16, BYTE, DOT_DTYPES, FP8, INT8, Weight
from nybble.kernels.gpu_quantizers import Rows

PART = 16 << 20
"""Elements of a weight that are decoded at a time: in 8 bits, a third of an H100's L2 cache."""
WHOLE = 128 << 20
"""Elements that are decoded at a time where torch multiplies."""
EXACT, USUAL = 64, 128
"""Columns that FP8 units, which keep 13 bits below the largest, add up by themselves: of E2M1's products, which are
quarters up to 36, 113 fit; of others as many as in torch's own products (where E2M1's sums are exact up to 4,096)."""
TORCH = True
"""Whether torch's own FP8 products are used where it has them: they are faster."""


@triton.jit
def _nibble(byte, HIGH: tl.constexpr, CODE: tl.constexpr, FLIP: tl.constexpr, ASSEMBLED: tl.constexpr):
    """Four bits as a byte: INT4 times 16 as int8 (1), E2M1 over 64 as E4M3 (2); four bytes at a time."""
    if CODE == 1:
        if ASSEMBLED:
            if HIGH:
                if FLIP:
                    b = tl.inline_asm_elementwise(
                        "{ .reg .b32 t; and.b32 t, $1, 0xF0F0F0F0; xor.b32 $0, t, 0x80808080; }",
                        "=r,r", [byte], tl.uint8, True, 4,
                    )  # fmt: skip
                else:
                    b = tl.inline_asm_elementwise("and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [byte], tl.uint8, True, 4)
            else:
                if FLIP:
                    b = tl.inline_asm_elementwise(
                        "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 t, t, 0xF0F0F0F0; xor.b32 $0, t, 0x80808080; }",
                        "=r,r", [byte], tl.uint8, True, 4,
                    )  # fmt: skip
                else:
                    b = tl.inline_asm_elementwise(
                        "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }",
                        "=r,r", [byte], tl.uint8, True, 4,
                    )  # fmt: skip
        else:
            b = (byte & 0xF0) if HIGH else ((byte << 4) & 0xF0)
            if FLIP:
                b = b ^ 0x80
        found = b.to(tl.int8, bitcast=True)
    else:
        if ASSEMBLED:
            if HIGH:
                b = tl.inline_asm_elementwise(
                    "{ .reg .b32 t, u; and.b32 t, $1, 0x80808080; shr.u32 u, $1, 2; and.b32 u, u, 0x1C1C1C1C; "
                    "or.b32 $0, t, u; }",
                    "=r,r", [byte], tl.uint8, True, 4,
                )  # fmt: skip
            else:
                b = tl.inline_asm_elementwise(
                    "{ .reg .b32 t, u; shl.b32 t, $1, 4; and.b32 t, t, 0x80808080; shl.b32 u, $1, 2; "
                    "and.b32 u, u, 0x1C1C1C1C; or.b32 $0, t, u; }",
                    "=r,r", [byte], tl.uint8, True, 4,
                )  # fmt: skip
        else:
            b = ((byte & 0x80) | ((byte >> 2) & 0x1C)) if HIGH else (((byte << 4) & 0x80) | ((byte << 2) & 0x1C))
        found = b.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    return found


@triton.jit
def _value(byte, HIGH: tl.constexpr, CODE: tl.constexpr, FLIP: tl.constexpr, ASSEMBLED: tl.constexpr):
    """Four bits as float32, exactly; integers less the bias."""
    code = _nibble(byte, HIGH, CODE, FLIP, ASSEMBLED)
    if CODE == 1:
        found = code.to(tl.float32) * 0.0625
    else:
        bits = code.to(tl.int8, bitcast=True).to(tl.int32)
        # E4M3's bits in float32's places, so that nothing depends on how a subnormal is converted
        bits = (bits & -2147483648) | ((bits & 0x7F) << 20)
        found = bits.to(tl.float32, bitcast=True) * 8.507059173023462e37
    return found


@triton.jit
def _brain(byte, HIGH: tl.constexpr):
    """Four bits of E2M1 as bfloat16, four bytes at a time: its bits in bfloat16's places, which are 2^126 too small."""
    if HIGH:
        found = tl.inline_asm_elementwise(
            "{ .reg .b32 t, u, z, p; mov.b32 z, 0x80008000; mov.b32 p, 0x7E807E80; "
            "prmt.b32 t, $2, 0, 0x4140; and.b32 u, t, 0x00700070; shl.b32 u, u, 2; and.b32 t, t, 0x00800080; "
            "shl.b32 t, t, 8; or.b32 t, t, u; fma.rn.bf16x2 $0, t, p, z; "
            "prmt.b32 t, $2, 0, 0x4342; and.b32 u, t, 0x00700070; shl.b32 u, u, 2; and.b32 t, t, 0x00800080; "
            "shl.b32 t, t, 8; or.b32 t, t, u; fma.rn.bf16x2 $1, t, p, z; }",
            "=r,=r,r", [byte], tl.bfloat16, True, 4,
        )  # fmt: skip
    else:
        found = tl.inline_asm_elementwise(
            "{ .reg .b32 t, u, z, p; mov.b32 z, 0x80008000; mov.b32 p, 0x7E807E80; "
            "prmt.b32 t, $2, 0, 0x4140; and.b32 u, t, 0x00070007; shl.b32 u, u, 6; and.b32 t, t, 0x00080008; "
            "shl.b32 t, t, 12; or.b32 t, t, u; fma.rn.bf16x2 $0, t, p, z; "
            "prmt.b32 t, $2, 0, 0x4342; and.b32 u, t, 0x00070007; shl.b32 u, u, 6; and.b32 t, t, 0x00080008; "
            "shl.b32 t, t, 12; or.b32 t, t, u; fma.rn.bf16x2 $1, t, p, z; }",
            "=r,=r,r", [byte], tl.bfloat16, True, 4,
        )  # fmt: skip
    return found


@triton.jit
def _doubled(byte, HIGH: tl.constexpr):
    """Four bits of E2M1, times two, as int8: looked up in eight bytes and in their negatives, four at a time."""
    if HIGH:
        found = tl.inline_asm_elementwise(
            "{ .reg .b32 t, u, p, n; shr.b32 t, $1, 4; and.b32 t, t, 0x07070707; shr.b32 u, t, 4; or.b32 t, t, u; "
            "prmt.b32 t, t, 0, 0x4420; mov.b32 p, 0x03020100; prmt.b32 p, p, 0x0C080604, t; mov.b32 n, 0xFDFEFF00; "
            "prmt.b32 n, n, 0xF4F8FAFC, t; prmt.b32 u, $1, 0, 0xBA98; lop3.b32 $0, p, n, u, 0xD8; }",
            "=r,r", [byte], tl.int8, True, 4,
        )  # fmt: skip
    else:
        found = tl.inline_asm_elementwise(
            "{ .reg .b32 t, u, p, n; and.b32 t, $1, 0x07070707; shr.b32 u, t, 4; or.b32 t, t, u; "
            "prmt.b32 t, t, 0, 0x4420; mov.b32 p, 0x03020100; prmt.b32 p, p, 0x0C080604, t; mov.b32 n, 0xFDFEFF00; "
            "prmt.b32 n, n, 0xF4F8FAFC, t; shl.b32 u, $1, 4; prmt.b32 u, u, 0, 0xBA98; "
            "lop3.b32 $0, p, n, u, 0xD8; }",
            "=r,r", [byte], tl.int8, True, 4,
        )  # fmt: skip
    return found


@triton.jit
def _corrected(part, n, m, g, first, xz, xsum, wz, wsum, groups, XZERO: tl.constexpr, WZERO: tl.constexpr):
    """``sum (x - xz) (w - wz)`` of ``part = sum x w``, int32 [m, n]; where it is the first part of a group."""
    if WZERO:
        part -= tl.load(xsum + m * groups + g)[:, None] * tl.load(wz + n * groups + g, mask=first, other=0)[None, :]
    if XZERO:
        part -= tl.load(xz + m)[:, None] * tl.load(wsum + n * groups + g, mask=first, other=0)[None, :]
    return part


@triton.jit
def _stored(acc, y, xs, ws, bias, rm, rn, m, n, rows, width, stride, XMANY: tl.constexpr, WROW: tl.constexpr,
            BIAS: tl.constexpr):  # fmt: skip
    """Scales, bias and the store of float32 [m, n]."""
    if XMANY:
        acc = acc * tl.load(xs + m)[:, None]
    else:
        acc = acc * tl.load(xs)
    if WROW:
        acc = acc * tl.load(ws + n)[None, :]
    if BIAS:
        acc = acc + tl.load(bias + n).to(tl.float32)[None, :]
    at = rm.to(tl.int64)[:, None] * stride + rn[None, :]
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=(rm < rows)[:, None] & (rn < width)[None, :])


@triton.jit
def _place(rows, width, BM: tl.constexpr, BN: tl.constexpr):
    """Tile of x's rows and of W's: eight of W's side by side, so that both stay in the cache."""
    pid, across, down = tl.program_id(0), tl.cdiv(width, BN), tl.cdiv(rows, BM)
    first = pid // (8 * down) * 8
    size = tl.minimum(across - first, 8)
    inside = pid % (8 * down)
    return inside // size, first + inside % size


@triton.jit
def _packed_product(
    x, w, y, xs, xz, xsum, ws, wz, wsum, inner, bias, rows, width, stride, plane,
    k: tl.constexpr, DOT: tl.constexpr, CODE: tl.constexpr, FLIP: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK: tl.constexpr, XZERO: tl.constexpr, WZERO: tl.constexpr, XMANY: tl.constexpr, BIAS: tl.constexpr,
    PROMOTED: tl.constexpr, ASSEMBLED: tl.constexpr, TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """W of two codes a byte, decoded here; x's even and odd columns apart; BK bytes of each row of W at a time."""
    half: tl.constexpr = k // 2
    tile_m, tile_n = _place(rows, width, BM, BN)
    rm, rn, rk = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    m, n = rm % rows, rn % width
    if not TMA:
        even = x + m.to(tl.int64)[None, :] * half + rk[:, None]
        odd = even + plane
        codes = w + n.to(tl.int64)[:, None] * half + rk[None, :]
    if DOT == 0 and GROUPS == 1:
        acc = tl.zeros((BN, BM), tl.int32)
    else:
        acc = tl.zeros((BN, BM), tl.float32)
    for start in range(0, half, BK):
        if TMA:
            byte = w.load([tile_n * BN, start])
            x0 = tl.trans(x.load([tile_m * BM, start]))
            x1 = tl.trans(x.load([rows + tile_m * BM, start]))
        elif half % BK == 0:
            byte, x0, x1 = tl.load(codes + start), tl.load(even + start), tl.load(odd + start)
        else:
            left = half - start
            byte = tl.load(codes + start, mask=rk[None, :] < left, other=0)
            x0 = tl.load(even + start, mask=rk[:, None] < left, other=0.0)
            x1 = tl.load(odd + start, mask=rk[:, None] < left, other=0.0)
        if BLOCK > 0 or DOT == 2 or (DOT == 1 and CODE == 1) or (DOT == 0 and CODE == 2):
            if DOT == 2 and CODE == 2 and ASSEMBLED:
                low, high = _brain(byte, False), _brain(byte, True)
            elif DOT == 0 and ASSEMBLED:
                low, high = _doubled(byte, False), _doubled(byte, True)
            else:
                low, high = _value(byte, False, CODE, FLIP, ASSEMBLED), _value(byte, True, CODE, FLIP, ASSEMBLED)
            if BLOCK > 0:
                count: tl.constexpr = BK * 2 // BLOCK if BK * 2 > BLOCK else 1
                block = start * 2 // BLOCK + tl.arange(0, count)
                at = inner + n.to(tl.int64)[:, None] * (k // BLOCK) + block[None, :]
                by = tl.load(at, mask=block[None, :] < k // BLOCK, other=0.0).to(low.dtype)  # exact
                by = tl.reshape(tl.broadcast_to(by[:, :, None], (BN, count, BK // count)), (BN, BK))
                low, high = low * by, high * by
            if DOT == 0 and not ASSEMBLED:
                low, high = low * 2.0, high * 2.0  # E2M1's values, whole
            if DOT == 2 and not ASSEMBLED:
                x0, x1 = x0.to(tl.float32), x1.to(tl.float32)
            low, high = low.to(x0.dtype), high.to(x0.dtype)
        else:
            low, high = _nibble(byte, False, CODE, FLIP, ASSEMBLED), _nibble(byte, True, CODE, FLIP, ASSEMBLED)
        if GROUPS == 1:
            if DOT == 0:
                acc = tl.dot(high, x1, tl.dot(low, x0, acc, out_dtype=tl.int32), out_dtype=tl.int32)
            elif DOT == 1:
                acc = tl.dot(low, x0, acc, max_num_imprecise_acc=PROMOTED)
                acc = tl.dot(high, x1, acc, max_num_imprecise_acc=PROMOTED)
            else:
                acc = tl.dot(high, x1, tl.dot(low, x0, acc, input_precision="ieee"), input_precision="ieee")
        else:
            g = start * 2 // (k // GROUPS)
            if DOT == 0:
                part = tl.dot(high, x1, tl.dot(low, x0, out_dtype=tl.int32), out_dtype=tl.int32)
                if CODE == 1:
                    part = part >> 4
                if XZERO or WZERO:
                    part = tl.trans(
                        _corrected(
                            tl.trans(part),
                            n,
                            m,
                            g,
                            (n >= 0) & (start * 2 % (k // GROUPS) == 0),
                            xz,
                            xsum,
                            wz,
                            wsum,
                            GROUPS,
                            XZERO,
                            WZERO,
                        )
                    )
                part = part.to(tl.float32)
            elif DOT == 1:
                part = tl.dot(high, x1, tl.dot(low, x0, max_num_imprecise_acc=PROMOTED), max_num_imprecise_acc=PROMOTED)
            else:
                part = tl.dot(high, x1, tl.dot(low, x0, input_precision="ieee"), input_precision="ieee")
            acc += part * tl.load(ws + n * GROUPS + g)[:, None]
    acc = tl.trans(acc)
    if DOT == 0 and GROUPS == 1:
        if CODE == 1:
            acc = acc >> 4
        acc = _corrected(acc, n, m, 0, n >= 0, xz, xsum, wz, wsum, 1, XZERO, WZERO).to(tl.float32)
    if DOT == 1 and CODE == 2 and BLOCK == 0:
        acc = acc * 64.0  # E2M1's bits in E4M3's places are a 64th
    _stored(acc, y, xs, ws, bias, rm, rn, m, n, rows, width, stride, XMANY, GROUPS == 1, BIAS)


@triton.jit
def _product(
    x, w, y, xs, xz, xsum, ws, wz, wsum, bias, rows, width, stride,
    k: tl.constexpr, DOT: tl.constexpr, FLIP: tl.constexpr, GROUPS: tl.constexpr,
    XZERO: tl.constexpr, WZERO: tl.constexpr, XMANY: tl.constexpr, BIAS: tl.constexpr,
    PROMOTED: tl.constexpr, ASSEMBLED: tl.constexpr, TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Both sides in the tensor cores' numbers."""
    tile_m, tile_n = _place(rows, width, BM, BN)
    rm, rn, rk = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    m, n = rm % rows, rn % width
    if not TMA:
        left_at = x + m.to(tl.int64)[:, None] * k + rk[None, :]
        right_at = w + n.to(tl.int64)[None, :] * k + rk[:, None]
    if DOT == 0 and GROUPS == 1:
        acc = tl.zeros((BM, BN), tl.int32)
    else:
        acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, k, BK):
        if TMA:
            a, b = x.load([tile_m * BM, start]), tl.trans(w.load([tile_n * BN, start]))
        elif k % BK == 0:
            a, b = tl.load(left_at + start), tl.load(right_at + start)
        else:
            a = tl.load(left_at + start, mask=rk[None, :] < k - start, other=0.0)
            b = tl.load(right_at + start, mask=rk[:, None] < k - start, other=0.0)
        if DOT == 0 and FLIP:
            b = b ^ -128
        if DOT == 2 and not ASSEMBLED:
            a, b = a.to(tl.float32), b.to(tl.float32)
        if GROUPS == 1:
            if DOT == 0:
                acc = tl.dot(a, b, acc, out_dtype=tl.int32)
            elif DOT == 1:
                acc = tl.dot(a, b, acc, max_num_imprecise_acc=PROMOTED)
            else:
                acc = tl.dot(a, b, acc, input_precision="ieee")
        else:
            g = start // (k // GROUPS)
            if DOT == 0:
                part = tl.dot(a, b, out_dtype=tl.int32)
                first = (n >= 0) & (start % (k // GROUPS) == 0)
                part = _corrected(part, n, m, g, first, xz, xsum, wz, wsum, GROUPS, XZERO, WZERO).to(tl.float32)
            elif DOT == 1:
                part = tl.dot(a, b, max_num_imprecise_acc=PROMOTED)
            else:
                part = tl.dot(a, b, input_precision="ieee")
            acc += part * tl.load(ws + n * GROUPS + g)[None, :]
    found = acc
    if DOT == 0 and GROUPS == 1:
        found = _corrected(acc, n, m, 0, n >= 0, xz, xsum, wz, wsum, 1, XZERO, WZERO).to(tl.float32)
    _stored(found, y, xs, ws, bias, rm, rn, m, n, rows, width, stride, XMANY, GROUPS == 1, BIAS)


@triton.jit
def _expand(
    codes, inner, out, count, CODE: tl.constexpr, FLIP: tl.constexpr, BLOCK: tl.constexpr, FACTOR: tl.constexpr,
    BYTES: tl.constexpr, FLOAT: tl.constexpr, ASSEMBLED: tl.constexpr,
):  # fmt: skip
    """Codes as the tensor cores' numbers, times exact block scales; in the codes' order."""
    at = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    byte = tl.load(codes + at, mask=at < count, other=0)
    if CODE == 0:
        to = at
        inside = at < count
        if FLOAT:
            value = byte.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        else:
            value = byte.to(tl.int8, bitcast=True).to(tl.float32)
            if FLIP:
                value = (byte ^ 0x80).to(tl.int8, bitcast=True).to(tl.float32)
    else:
        if CODE == 2 and ASSEMBLED and out.dtype.element_ty == tl.bfloat16:
            low, high = _brain(byte, False), _brain(byte, True)
        else:
            low, high = _value(byte, False, CODE, FLIP, ASSEMBLED), _value(byte, True, CODE, FLIP, ASSEMBLED)
        value = tl.interleave(low, high)
        to = tl.program_id(0).to(tl.int64) * (2 * BYTES) + tl.arange(0, 2 * BYTES)
        inside = to < 2 * count
    if BLOCK > 0:
        wide: tl.constexpr = BYTES if CODE == 0 else 2 * BYTES
        if wide % BLOCK == 0:  # each scale is read once
            each: tl.constexpr = wide // BLOCK
            block = tl.program_id(0).to(tl.int64) * each + tl.arange(0, each)
            many = count if CODE == 0 else 2 * count
            by = tl.load(inner + block, mask=block * BLOCK < many, other=0.0).to(value.dtype)
            value = tl.reshape(tl.reshape(value, (each, BLOCK)) * by[:, None], (wide,))
        else:
            value = value * tl.load(inner + to // BLOCK, mask=inside, other=0.0)
    if FACTOR != 1.0:
        value = value * FACTOR
    tl.store(out + to, value.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Tile:
    """Rows of x, rows of W and columns (bytes of packed codes) of a tile; warps, and tiles on their way.

    Attributes:
        tma: whether the copy engine brings them.
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    tma: bool = False


SMALL = Tile(32, 32, 64, 4, 1)
"""For the interpreter."""
DENSE = {
    INT8: Tile(128, 256, 128, 8, 4, True),
    FP8: Tile(256, 128, 128, 8, 3, True),
    BF16: Tile(128, 256, 64, 8, 4, True),
}
FEW_DENSE = Tile(64, 64, 128, 4, 4)
"""For operands in the tensor cores' numbers."""
PACKED = {
    16: Tile(16, 64, 256, 4, 3),
    32: Tile(32, 64, 128, 4, 4),
    64: Tile(64, 64, 128, 4, 4),
    128: Tile(128, 128, 64, 4, 4, True),
}
"""For packed weights, by the rows of x up to which they are for (the last: beyond); bfloat16 takes half the columns."""


def expand(weight: Weight, by: Tensor | None, factor: float, out: Tensor, start: int, stop: int) -> Tensor:
    """Rows ``start`` to ``stop`` of ``factor * code * by``, integers less their bias, in ``out`` [enough rows, k]."""
    codes, made = weight.codes[start:stop], out[: stop - start]
    scales = weight.scale if by is None else by[start:stop]
    size = 2048 if weight.code == BYTE else 1024
    _expand[(triton.cdiv(codes.numel(), size),)](
        codes, scales, made, codes.numel(), CODE=weight.code, FLIP=weight.flip != 0,
        BLOCK=0 if by is None else weight.block, FACTOR=factor, BYTES=size, FLOAT=not weight.whole,
        ASSEMBLED=not INTERPRETED,
    )  # fmt: skip
    return made


def fits(weight: Weight, dot: int, planes: bool) -> bool:
    """Whether a group of columns fills a step of the tensor cores, and zero points are where they are taken off."""
    if weight.zero is not None and dot != INT8:
        return False
    step = 32 if dot != BF16 else 16
    groups = weight.scale.shape[1]
    size = weight.group // (2 if planes else 1)
    return groups == 1 or (size >= step and size & (size - 1) == 0)


def product(rows: Rows, weight: Weight, dot: int, promote: int, bias: Tensor | None, out: Tensor) -> Tensor:
    """``x W^T + bias``.

    Args:
        rows: of x, codes in the dtype of ``dot``; even and odd columns apart where a packed weight is decoded inside.
        weight: of a plan.
        dot: :data:`INT8`, :data:`FP8` or :data:`BF16`.
        promote: columns whose products FP8 units add up by themselves.
        bias: [n] or None.
        out: [rows, n], float32, bfloat16 or float16, contiguous; is filled, or another returned.
    """
    scale, by, factor = weight.on(dot)
    if rows.codes.dim() == 3:
        return _inside(rows, weight, dot, promote, scale, by, bias, out)
    if (
        weight.code == BYTE
        and by is None
        and not by_torch(weight, dot, out)
        and (dot == INT8 if weight.whole else dot == FP8)
    ):
        codes = weight.codes.view(DOT_DTYPES[dot])
        _dense(rows, codes, weight, dot, promote, scale, bias, out, 0, weight.n, weight.flip != 0)
        return out
    if by_torch(weight, dot, out):
        return _by_torch(rows, weight, scale, by, factor, bias, out)
    step = min(weight.n, max(128, PART // weight.k // 128 * 128))
    room = torch.empty((step, weight.k), dtype=DOT_DTYPES[dot], device=out.device)
    for start in range(0, weight.n, step):
        stop = min(start + step, weight.n)
        codes = expand(weight, by, factor, room, start, stop)
        _dense(rows, codes, weight, dot, promote, scale, bias, out, start, stop, False)
    return out


def by_torch(weight: Weight, dot: int, out: Tensor) -> bool:
    """Whether torch has a product with scales of rows: of E4M3, its partial sums promoted as :data:`USUAL` says."""
    sizes = weight.k % 16 == 0 and weight.n % 16 == 0 and weight.scale.shape[1] == 1
    return TORCH and dot == FP8 and out.is_cuda and out.dtype == torch.bfloat16 and out.shape[0] > 64 and sizes


def _by_torch(
    rows: Rows, weight: Weight, scale: Tensor, by: Tensor | None, factor: float, bias: Tensor | None, out: Tensor
) -> Tensor:
    left = rows.scale.expand(out.shape[0]).view(-1, 1).contiguous()
    step, parts = max(16, WHOLE // weight.k // 16 * 16), []
    for start in range(0, weight.n, step):
        stop = min(start + step, weight.n)
        if weight.code == BYTE and by is None:
            codes = weight.codes[start:stop].view(torch.float8_e4m3fn)
        else:
            room = torch.empty((stop - start, weight.k), dtype=torch.float8_e4m3fn, device=out.device)
            codes = expand(weight, by, factor, room, start, stop)
        right = scale[start:stop].view(1, -1).contiguous()
        added = None if bias is None else bias[start:stop].to(out.dtype)
        parts.append(
            torch._scaled_mm(rows.codes, codes.t(), left, right, bias=added, out_dtype=out.dtype, use_fast_accum=False)
        )
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _inside(
    rows: Rows, weight: Weight, dot: int, promote: int, scale: Tensor, by: Tensor | None, bias: Tensor | None,
    out: Tensor,
) -> Tensor:  # fmt: skip
    """A packed weight, decoded inside the product."""
    count, groups = out.shape[0], scale.shape[1]
    tile = PACKED.get(shared(count)) or PACKED[max(PACKED)]
    bm, bn = (tile.bm, tile.bn) if not INTERPRETED else (min(tile.bm, 32), 32)
    bk = min(tile.bk if dot != BF16 else min(64, tile.bk // 2), max(32, shared(weight.k // 2)))
    bk = min(bk, weight.group // 2) if groups > 1 else bk
    none, tma = rows.scale, tile.tma and weight.k % 32 == 0
    codes, x = weight.codes, rows.codes
    if tma:
        x = TensorDescriptor.from_tensor(x.view(2 * count, -1), [bm, bk])
        codes = TensorDescriptor.from_tensor(codes, [bn, bk])
    args = (
        x, codes, out, rows.scale, _or(rows.zero, none), _or(rows.sums, none), scale, _or(weight.zero, none),
        _or(weight.sums, none), _or(by, none), _or(bias, none),
    )  # fmt: skip
    many = rows.scale.numel() > 1
    sides = (many, rows.zero is None, rows.sums is None, None if bias is None else bias.dtype, aligned(bias))
    weight.launches((count, out.dtype, dot, promote, tile, sides), _packed_product, args, lambda: (
        (count, weight.n, out.stride(0), rows.codes.stride(0)),
        (-(-count // bm) * -(-weight.n // bn), 1, 1),
        {"k": weight.k, "DOT": dot, "CODE": weight.code, "FLIP": weight.flip != 0, "GROUPS": groups,
         "BLOCK": 0 if by is None else weight.block, "XZERO": rows.zero is not None, "WZERO": weight.zero is not None,
         "XMANY": many, "BIAS": bias is not None, "PROMOTED": min(promote, bk), "ASSEMBLED": not INTERPRETED,
         "TMA": tma, "BM": bm, "BN": bn, "BK": bk, "num_warps": tile.warps, "num_stages": tile.stages},
    ))  # fmt: skip
    return out


def _dense(
    rows: Rows, codes: Tensor, weight: Weight, dot: int, promote: int, scale: Tensor, bias: Tensor | None, out: Tensor,
    start: int, stop: int, flip: bool,
) -> None:  # fmt: skip
    """Rows ``start`` to ``stop`` of W."""
    count, groups = out.shape[0], scale.shape[1]
    tile = SMALL if INTERPRETED else FEW_DENSE if count <= 64 else DENSE[dot]
    bm = min(tile.bm, shared(count))
    bk = min(tile.bk, weight.group) if groups > 1 else tile.bk
    none, tma = rows.scale, tile.tma and weight.k * codes.element_size() % 16 == 0
    x = rows.codes
    if tma:
        x, codes = (TensorDescriptor.from_tensor(t, [b, bk]) for t, b in ((x, bm), (codes, tile.bn)))
    part = [None if t is None else t[start:stop] for t in (scale, weight.zero, weight.sums, bias)]
    args = (
        x, codes, out[:, start:stop], rows.scale, _or(rows.zero, none), _or(rows.sums, none), part[0],
        _or(part[1], none), _or(part[2], none), _or(part[3], none),
    )  # fmt: skip
    many = rows.scale.numel() > 1
    sides = (many, rows.zero is None, rows.sums is None, None if bias is None else bias.dtype, *map(aligned, part))
    key = (count, stop - start, aligned(args[2]), out.dtype, dot, promote, tile, flip, sides)
    weight.launches(key, _product, args, lambda: (
        (count, stop - start, out.stride(0)),
        (-(-count // bm) * -(-(stop - start) // tile.bn), 1, 1),
        {"k": weight.k, "DOT": dot, "FLIP": flip, "GROUPS": groups, "XZERO": rows.zero is not None,
         "WZERO": weight.zero is not None, "XMANY": many, "BIAS": bias is not None, "PROMOTED": min(promote, bk),
         "ASSEMBLED": not INTERPRETED, "TMA": tma, "BM": bm, "BN": tile.bn, "BK": bk, "num_warps": tile.warps,
         "num_stages": tile.stages},
    ))  # fmt: skip


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A pointer for the kernel, which doesn't read it where there is no tensor."""
    return other if tensor is None else tensor
