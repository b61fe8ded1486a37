# mypy: disallow-untyped-decorators=false, disallow-untyped-defs=false
"""Products of two quantized operands on tensor cores: INT8, FP8, or bfloat16 where both are exact in it.

Whole numbers are added up as such. On FP8 units, whose accumulators are narrow, partial sums go to float32 as often as
``PROMOTE`` columns; E2M1's products are whole quarters, of which 64 fit. A weight of 4 bits is read as it lies: for few
rows of x inside the product, where even and odd columns are two products, so that no code changes places; for many
rows it is decoded a part at a time into numbers that stay in the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.kernels._gpu import INTERPRETED, shared
from nybble.kernels._gpu_operands import BF16, BYTE, DOT_DTYPES, FP8, INT8, Weight, shifted
from nybble.kernels.gpu_quantizers import Rows

FEW = 64
"""Rows of x up to which a weight is decoded inside the product."""
PART = 8 << 20
"""Elements of a weight that are decoded at a time: in 8 bits, a sixth of an H100's L2 cache."""
PROMOTE = 64


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
    PROMOTED: tl.constexpr, ASSEMBLED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """W of two codes a byte, decoded here; x's even and odd columns apart; BK bytes of each row of W at a time."""
    half: tl.constexpr = k // 2
    tile_m, tile_n = _place(rows, width, BM, BN)
    rm, rn, rk = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    m, n = rm % rows, rn % width
    even = x + m.to(tl.int64)[None, :] * half + rk[:, None]
    odd = even + plane
    codes = w + n.to(tl.int64)[:, None] * half + rk[None, :]
    if DOT == 0 and GROUPS == 1:
        acc = tl.zeros((BN, BM), tl.int32)
    else:
        acc = tl.zeros((BN, BM), tl.float32)
    for start in range(0, half, BK):
        if half % BK == 0:
            byte, x0, x1 = tl.load(codes + start), tl.load(even + start), tl.load(odd + start)
        else:
            left = half - start
            byte = tl.load(codes + start, mask=rk[None, :] < left, other=0)
            x0 = tl.load(even + start, mask=rk[:, None] < left, other=0.0)
            x1 = tl.load(odd + start, mask=rk[:, None] < left, other=0.0)
        if BLOCK > 0 or DOT == 2 or (DOT == 1 and CODE == 1):
            low, high = _value(byte, False, CODE, FLIP, ASSEMBLED), _value(byte, True, CODE, FLIP, ASSEMBLED)
            if BLOCK > 0:
                at = inner + n.to(tl.int64)[:, None] * (k // BLOCK) + (start + rk[None, :]) * 2 // BLOCK
                by = tl.load(at, mask=rk[None, :] < half - start, other=0.0)
                low, high = low * by, high * by
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
                part = tl.dot(high, x1, tl.dot(low, x0, out_dtype=tl.int32), out_dtype=tl.int32) >> 4
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
        acc = _corrected(acc >> 4, n, m, 0, n >= 0, xz, xsum, wz, wsum, 1, XZERO, WZERO).to(tl.float32)
    if DOT == 1 and CODE == 2 and BLOCK == 0:
        acc = acc * 64.0  # E2M1's bits in E4M3's places are a 64th
    _stored(acc, y, xs, ws, bias, rm, rn, m, n, rows, width, stride, XMANY, GROUPS == 1, BIAS)


@triton.jit
def _product(
    x, w, y, xs, xz, xsum, ws, wz, wsum, bias, rows, width, stride,
    k: tl.constexpr, DOT: tl.constexpr, FLIP: tl.constexpr, GROUPS: tl.constexpr,
    XZERO: tl.constexpr, WZERO: tl.constexpr, XMANY: tl.constexpr, BIAS: tl.constexpr,
    PROMOTED: tl.constexpr, ASSEMBLED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Both sides in the tensor cores' numbers."""
    tile_m, tile_n = _place(rows, width, BM, BN)
    rm, rn, rk = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    m, n = rm % rows, rn % width
    left_at = x + m.to(tl.int64)[:, None] * k + rk[None, :]
    right_at = w + n.to(tl.int64)[None, :] * k + rk[:, None]
    if DOT == 0 and GROUPS == 1:
        acc = tl.zeros((BM, BN), tl.int32)
    else:
        acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, k, BK):
        if k % BK == 0:
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
        low, high = _value(byte, False, CODE, FLIP, ASSEMBLED), _value(byte, True, CODE, FLIP, ASSEMBLED)
        value = tl.interleave(low, high)
        to = tl.program_id(0).to(tl.int64) * (2 * BYTES) + tl.arange(0, 2 * BYTES)
        inside = to < 2 * count
    if BLOCK > 0:
        value = value * tl.load(inner + to // BLOCK, mask=inside, other=0.0)
    value = value * FACTOR
    tl.store(out + to, value.to(out.dtype.element_ty), mask=inside)


def expand(weight: Weight, dot: int, inner: Tensor | None, out: Tensor, start: int, stop: int) -> Tensor:
    """Rows ``start`` to ``stop`` of a weight in the dtype of ``out`` [at least as many, k]; integers less their bias."""
    codes = weight.codes[start:stop]
    made = out[: stop - start]
    by = weight.scale if inner is None else inner[start:stop]
    size = 2048 if weight.code == BYTE else 1024
    _expand[(triton.cdiv(codes.numel(), size),)](
        codes, by, made, codes.numel(), CODE=weight.code, FLIP=weight.flip != 0,
        BLOCK=0 if inner is None else weight.block, FACTOR=1.0, BYTES=size, FLOAT=not weight.whole,
        ASSEMBLED=not INTERPRETED,
    )  # fmt: skip
    return made


def kind_of(rows_kind: int, weight: Weight) -> int:
    """The tensor cores for a product: of x in INT8, FP8 or bfloat16, and a weight."""
    if rows_kind == BF16:
        return BF16
    if rows_kind == INT8:
        return INT8 if weight.whole and weight.inner is None and weight.group >= 64 else BF16
    return FP8 if weight.fp8 and weight.zero is None and (weight.inner is not None or weight.group >= 64) else BF16


def fits(weight: Weight, dot: int, planes: bool) -> bool:
    """Whether a group of columns fills a step of the tensor cores, and zero points are where they are taken off."""
    if weight.zero is not None and dot != INT8:
        return False
    step = 32 if dot != BF16 else 16
    groups = weight.scale.shape[1]
    size = weight.group // (2 if planes else 1)
    return groups == 1 or (size >= step and size & (size - 1) == 0)


def product(rows: Rows, weight: Weight, dot: int, bias: Tensor | None, out: Tensor) -> Tensor:
    """``x W^T + bias``.

    Args:
        rows: of x, codes in the dtype of ``dot``; even and odd columns apart for the product of few rows.
        weight: of a plan.
        dot: :data:`INT8`, :data:`FP8` or :data:`BF16`.
        bias: [n] or None.
        out: [rows, n], float32, bfloat16 or float16, contiguous; is filled.
    """
    scale, inner = shifted(weight) if dot == FP8 else (weight.scale, weight.inner)
    if rows.codes.dim() == 3:
        return _few(rows, weight, dot, scale, inner, bias, out)
    direct = weight.code == BYTE and inner is None and (dot == INT8 if weight.whole else dot == FP8)
    if direct:
        codes = weight.codes.view(DOT_DTYPES[dot])
        _dense(rows, codes, weight, dot, scale, bias, out, 0, weight.n, weight.flip != 0)
        return out
    step = min(weight.n, max(128, PART // weight.k // 128 * 128))
    room = torch.empty((step, weight.k), dtype=DOT_DTYPES[dot], device=out.device)
    for start in range(0, weight.n, step):
        stop = min(start + step, weight.n)
        codes = expand(weight, dot, inner, room, start, stop)
        _dense(rows, codes, weight, dot, scale, bias, out, start, stop, False)
    return out


def _few(
    rows: Rows, weight: Weight, dot: int, scale: Tensor, inner: Tensor | None, bias: Tensor | None, out: Tensor
) -> Tensor:
    count, groups = out.shape[0], scale.shape[1]
    bm = shared(min(count, 64))
    bk = min(128, max(32, shared(weight.k // 2))) if dot != BF16 else min(64, shared(weight.k // 2))
    bk = min(bk, weight.group // 2) if groups > 1 else bk
    bn = 64 if not INTERPRETED else 32
    none = rows.scale
    _packed_product[(triton.cdiv(count, bm) * triton.cdiv(weight.n, bn),)](
        rows.codes, weight.codes, out, rows.scale, _or(rows.zero, none), _or(rows.sums, none), scale,
        _or(weight.zero, none), _or(weight.sums, none), _or(inner, none), _or(bias, none), count, weight.n,
        out.stride(0), rows.codes.stride(0), k=weight.k, DOT=dot, CODE=weight.code, FLIP=weight.flip != 0, GROUPS=groups,
        BLOCK=0 if inner is None else weight.block, XZERO=rows.zero is not None, WZERO=weight.zero is not None,
        XMANY=rows.scale.numel() > 1, BIAS=bias is not None, PROMOTED=min(PROMOTE, bk), ASSEMBLED=not INTERPRETED,
        BM=bm, BN=bn, BK=bk, num_warps=4, num_stages=4,
    )  # fmt: skip
    return out


CONFIGS = {INT8: (128, 256, 128, 8, 3), FP8: (128, 128, 128, 8, 4), BF16: (128, 256, 64, 8, 3)}
"""Rows of x, of W and columns of a tile; warps, and tiles on their way."""


def _dense(
    rows: Rows, codes: Tensor, weight: Weight, dot: int, scale: Tensor, bias: Tensor | None, out: Tensor,
    start: int, stop: int, flip: bool,
) -> None:  # fmt: skip
    """Rows ``start`` to ``stop`` of W."""
    count, groups = out.shape[0], scale.shape[1]
    bm, bn, bk, warps, stages = CONFIGS[dot] if not INTERPRETED else (32, 32, 64, 4, 1)
    bk = min(bk, weight.group) if groups > 1 else bk
    none = rows.scale
    part = [None if t is None else t[start:stop] for t in (scale, weight.zero, weight.sums, bias)]
    _product[(triton.cdiv(count, bm) * triton.cdiv(stop - start, bn),)](
        rows.codes, codes, out[:, start:stop], rows.scale, _or(rows.zero, none), _or(rows.sums, none),
        part[0], _or(part[1], none), _or(part[2], none), _or(part[3], none), count, stop - start, out.stride(0),
        k=weight.k, DOT=dot, FLIP=flip, GROUPS=groups, XZERO=rows.zero is not None, WZERO=weight.zero is not None,
        XMANY=rows.scale.numel() > 1, BIAS=bias is not None, PROMOTED=min(PROMOTE, bk), ASSEMBLED=not INTERPRETED,
        BM=bm, BN=bn, BK=bk, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A pointer for the kernel, which doesn't read it where there is no tensor."""
    return other if tensor is None else tensor
