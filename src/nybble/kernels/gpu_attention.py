# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Attention of single queries over keys and values in few bits, which are read as they lie in the cache.

Flash decoding (Dao et al. 2023): programs share the tokens of a head of keys among them, each for all the queries that
meet it, and a second kernel adds up what they found. Codes of four bits lie two in a byte: even and odd columns of the
head are two products. Scales of whole tokens are applied to scores and probabilities, others to the values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.formats.integer import IntFormat
from nybble.kernels._gpu import INTERPRETED, shared
from nybble.kernels._gpu_tiles import _value
from nybble.nn.cached_attention import cached_attention
from nybble.nn.kv_operators import stored_rows
from nybble.nn.operands import check_attention
from nybble.qtensor import dense
from nybble.qtensor.block import BlockQTensor

Rows = tuple[Sequence[Tensor], str, str, Tensor]
"""Stored tensors, their names, the quantizer's line, and the newest tokens."""
FLOAT, INT8, FP8, INT4, E2M1 = range(5)
PLAIN, E4M3, E8M0 = range(3)
_STEP = 64


@dataclass(frozen=True)
class Side:
    """Keys or values [batch, heads, tokens, width] as they are stored.

    Attributes:
        codes: uint8 [batch, heads, tokens, bytes]; or floats themselves.
        code: what they are.
        flip: whether integers are unsigned.
        width: of a head.
        scale: floats or uint8 codes [batch, heads, tokens, scales]; None of floats.
        stored: :data:`PLAIN`, :data:`E4M3` or :data:`E8M0`: what the scales are.
        outer: float32 [batch, heads, tokens], by which E4M3 scales are multiplied; or None.
        zero: uint8 codes of zero points, shaped like the scale, or None.
    """

    codes: Tensor
    code: int
    flip: bool
    width: int
    scale: Tensor | None = None
    stored: int = PLAIN
    outer: Tensor | None = None
    zero: Tensor | None = None

    @staticmethod
    def of(found: BlockQTensor | Tensor) -> Side | None:
        """The stored form of keys or values; None where the kernel can't read it."""
        if isinstance(found, Tensor):
            width = found.shape[-1]
            return None if width & (width - 1) or width < 32 else Side(found.contiguous(), FLOAT, False, width)
        fmt, params, width = found.format, found.params, found.shape[-1]
        names = {"float8_e4m3fn": FP8, "float4_e2m1fn": E2M1}
        code = {4: INT4, 8: INT8}.get(fmt.bits) if isinstance(fmt, IntFormat) else names.get(fmt.name)
        known = code is not None and params.offset is None and params.grid is None and found.layout == "dense"
        if not known or width & (width - 1) or width < 32:
            return None
        assert code is not None
        flip = isinstance(fmt, IntFormat) and not fmt.is_signed
        side = Side(found.codes.view(*found.shape[:-1], -1), code, flip, width)
        zero, lead = params.zero_point, found.shape[:-1]
        if isinstance(zero, BlockQTensor) and zero.format.bits == 8:
            side = replace(side, zero=zero.codes.view(*lead, -1))
        elif isinstance(zero, BlockQTensor):  # four bits: a byte each, so that the kernel finds them
            side = replace(side, zero=zero.unpacked().reshape(*lead, -1))
        return _scaled(side, params.scale, lead)

    @property
    def nbytes(self) -> int:
        """What the kernel reads."""
        return sum(t.nbytes for t in self._tensors())

    def copy(self) -> Side:
        """The same in memory of its own."""
        names = ("codes", "scale", "outer", "zero")
        found = {name: getattr(self, name) for name in names}
        return replace(self, **{name: t.clone() for name, t in found.items() if t is not None})

    def _tensors(self) -> list[Tensor]:
        return [t for t in (self.codes, self.scale, self.outer, self.zero) if t is not None]


def _scaled(side: Side, scale: object, lead: tuple[int, ...]) -> Side | None:
    if isinstance(scale, Tensor):
        return replace(side, scale=scale.reshape(*lead, -1))
    if not isinstance(scale, BlockQTensor) or scale.params.zero_point is not None:
        return None
    codes, outer = scale.codes.view(*lead, -1), scale.params.scale
    if scale.format.name == "float8_e8m0fnu" and outer is None:
        return replace(side, scale=codes, stored=E8M0)
    if scale.format.name == "float8_e4m3fn" and isinstance(outer, Tensor) and str(scale.granularity) == "token":
        return replace(side, scale=codes, stored=E4M3, outer=dense(outer).reshape(lead))
    return None


@triton.jit
def _scale(scale, outer, row, at, count: tl.constexpr, STORED: tl.constexpr, inside):
    """float32 scales of some rows (tokens) and columns of scales."""
    found = tl.load(scale + row * count + at, mask=inside, other=0)
    if STORED == 1:
        bits = found.to(tl.int32)
        bits = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
        wide = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
        wide = wide * tl.load(outer + row, mask=inside, other=0.0)
    elif STORED == 2:
        bits = found.to(tl.int32)
        wide = tl.where(bits > 0, bits << 23, 1 << 22).to(tl.float32, bitcast=True)
    else:
        wide = found.to(tl.float32)
    return wide


@triton.jit
def _wide(found, COUNT: tl.constexpr, PER: tl.constexpr, STEP: tl.constexpr, DOWN: tl.constexpr):
    """Each scale as often as it has columns: of [scales, tokens] where columns go down, else of [tokens, scales]."""
    if DOWN:
        wide = tl.reshape(tl.broadcast_to(found[:, None, :], (COUNT, PER, STEP)), (COUNT * PER, STEP))
    else:
        wide = tl.reshape(tl.broadcast_to(found[:, :, None], (STEP, COUNT, PER)), (STEP, COUNT * PER))
    return wide


@triton.jit
def _codes(codes, row, column, bytes_of_row: tl.constexpr, CODE: tl.constexpr, inside):
    return tl.load(codes + row * bytes_of_row + column, mask=inside, other=0)


@triton.jit
def _decoded(byte, HIGH: tl.constexpr, CODE: tl.constexpr, FLIP: tl.constexpr, ASSEMBLED: tl.constexpr):
    """float32 values of codes: all (of a byte each), or even or odd columns."""
    if CODE == 0:
        found = byte.to(tl.float32)
    elif CODE == 1:
        if FLIP:
            byte = byte ^ 0x80
        found = byte.to(tl.int8, bitcast=True).to(tl.float32)
    elif CODE == 2:
        if ASSEMBLED:
            found = byte.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        else:  # the interpreter's conversion loses subnormals
            bits = byte.to(tl.int32)
            bits = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
            found = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    elif CODE == 3:
        found = _value(byte, HIGH, 1, FLIP, ASSEMBLED)
    else:
        found = _value(byte, HIGH, 2, FLIP, ASSEMBLED)
    return found


@triton.jit
def _zeros(zero, row, at, count: tl.constexpr, CODE: tl.constexpr, FLIP: tl.constexpr, inside):
    """Zero points, less the bias of unsigned codes."""
    byte = tl.load(zero + row * count + at, mask=inside, other=0).to(tl.int32)
    half: tl.constexpr = 8 if CODE == 3 else 128
    if FLIP:
        number = byte - half
    else:
        number = tl.where(byte >= half, byte - 2 * half, byte)
    return number.to(tl.float32)


@triton.jit
def _tile(
    byte, HIGH: tl.constexpr, row, inside, scale, outer, zero, dtype: tl.constexpr, DOWN: tl.constexpr,
    BYTES: tl.constexpr, STEP: tl.constexpr, SCALES: tl.constexpr, CODE: tl.constexpr, FLIP: tl.constexpr,
    STORED: tl.constexpr, ZERO: tl.constexpr, ASSEMBLED: tl.constexpr,
):  # fmt: skip
    """Values of a tile of tokens, in ``dtype``, columns downwards or across; what whole tokens share is left out."""
    found = _decoded(byte, HIGH, CODE, FLIP, ASSEMBLED)
    if SCALES > 0:
        per: tl.constexpr = BYTES // SCALES
        if DOWN:
            at, row, inside = tl.arange(0, SCALES)[:, None], row[None, :], inside[None, :]
        else:
            at, row, inside = tl.arange(0, SCALES)[None, :], row[:, None], inside[:, None]
        if ZERO and SCALES > 1:
            found = found - _wide(_zeros(zero, row, at, SCALES, CODE, FLIP, inside), SCALES, per, STEP, DOWN)
        if SCALES > 1:
            found = found * _wide(_scale(scale, outer, row, at, SCALES, STORED, inside), SCALES, per, STEP, DOWN)
    return found.to(dtype)


@triton.jit
def _attend(
    q, k, ks, ko, kz, v, vs, vo, vz, mask, most, total, found, tokens, first, slots, scaling,
    GROUP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, VWIDTH: tl.constexpr,
    KCODE: tl.constexpr, KFLIP: tl.constexpr, KSCALES: tl.constexpr, KSTORED: tl.constexpr, KZERO: tl.constexpr,
    VCODE: tl.constexpr, VFLIP: tl.constexpr, VSCALES: tl.constexpr, VSTORED: tl.constexpr, VZERO: tl.constexpr,
    MASKED: tl.constexpr, HEADS: tl.constexpr, STEPS: tl.constexpr, STEP: tl.constexpr, ASSEMBLED: tl.constexpr,
):  # fmt: skip
    """One head of keys and some tokens: the largest score, the sum, and the unscaled result of each query."""
    head, part = tl.program_id(0), tl.program_id(1)
    dtype: tl.constexpr = tl.bfloat16 if ASSEMBLED else tl.float32
    kparts: tl.constexpr = 2 if KCODE > 2 else 1
    vparts: tl.constexpr = 2 if VCODE > 2 else 1
    kbytes: tl.constexpr = WIDTH // kparts
    vbytes: tl.constexpr = VWIDTH // vparts
    query, kcol, vcol = tl.arange(0, ROWS), tl.arange(0, kbytes), tl.arange(0, vbytes)
    real = (query < GROUP)[:, None]
    at = q + (head.to(tl.int64) * GROUP + query[:, None]) * WIDTH + kcol[None, :] * kparts
    q0 = (tl.load(at, mask=real, other=0.0).to(tl.float32)).to(dtype)
    if kparts == 2:
        q1 = (tl.load(at + 1, mask=real, other=0.0).to(tl.float32)).to(dtype)
    if KZERO and KSCALES == 1:
        whole = tl.sum(q0.to(tl.float32), 1)
        if kparts == 2:
            whole += tl.sum(q1.to(tl.float32), 1)
    shifts = tl.zeros((ROWS,), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    sums = tl.zeros((ROWS,), tl.float32)
    acc0 = tl.zeros((ROWS, vbytes), tl.float32)
    acc1 = tl.zeros((ROWS, vbytes), tl.float32)
    for step in range(STEPS):
        token = (part * STEPS + step) * STEP + tl.arange(0, STEP)
        inside = token < tokens
        row = head.to(tl.int64) * tokens + token
        byte = _codes(k, row[None, :], kcol[:, None], kbytes, KCODE, inside[None, :])
        tile = _tile(byte, False, row, inside, ks, ko, kz, dtype, True,
                     kbytes, STEP, KSCALES, KCODE, KFLIP, KSTORED, KZERO, ASSEMBLED)  # fmt: skip
        score = tl.dot(q0, tile, input_precision="ieee")
        if kparts == 2:
            tile = _tile(byte, True, row, inside, ks, ko, kz, dtype, True,
                         kbytes, STEP, KSCALES, KCODE, KFLIP, KSTORED, KZERO, ASSEMBLED)  # fmt: skip
            score = tl.dot(q1, tile, score, input_precision="ieee")
        if KZERO and KSCALES == 1:
            score -= whole[:, None] * _zeros(kz, row, 0, 1, KCODE, KFLIP, inside)[None, :]
        if KSCALES == 1:
            score = score * _scale(ks, ko, row, 0, 1, KSTORED, inside)[None, :]
        score = score * scaling
        if MASKED:
            score += tl.load(mask + (head // HEADS) * tokens + token, mask=inside, other=0.0)[None, :]
        score = tl.where(inside[None, :], score, float("-inf"))
        new = tl.maximum(top, tl.max(score, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        kept = tl.exp(top - safe)
        p = tl.exp(score - safe[:, None])
        sums = sums * kept + tl.sum(p, 1)
        top = new
        if VSCALES == 1:
            p = p * _scale(vs, vo, row, 0, 1, VSTORED, inside)[None, :]
            if VZERO:
                shifts = shifts * kept + tl.sum(p * _zeros(vz, row, 0, 1, VCODE, VFLIP, inside)[None, :], 1)
        p = p.to(dtype)
        byte = _codes(v, row[:, None], vcol[None, :], vbytes, VCODE, inside[:, None])
        tile = _tile(byte, False, row, inside, vs, vo, vz, dtype, False,
                     vbytes, STEP, VSCALES, VCODE, VFLIP, VSTORED, VZERO, ASSEMBLED)  # fmt: skip
        acc0 = tl.dot(p, tile, acc0 * kept[:, None], input_precision="ieee")
        if vparts == 2:
            tile = _tile(byte, True, row, inside, vs, vo, vz, dtype, False,
                         vbytes, STEP, VSCALES, VCODE, VFLIP, VSTORED, VZERO, ASSEMBLED)  # fmt: skip
            acc1 = tl.dot(p, tile, acc1 * kept[:, None], input_precision="ieee")
    if VZERO and VSCALES == 1:
        acc0, acc1 = acc0 - shifts[:, None], acc1 - shifts[:, None]
    slot = (head.to(tl.int64) * GROUP + query) * slots + first + part
    tl.store(most + slot, top, mask=query < GROUP)
    tl.store(total + slot, sums, mask=query < GROUP)
    to = found + slot[:, None] * VWIDTH + vcol[None, :] * vparts
    tl.store(to, acc0, mask=real)
    if vparts == 2:
        tl.store(to + 1, acc1, mask=real)


@triton.jit
def _combine(most, total, found, out, slots, WIDTH: tl.constexpr, SLOTS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    slot, column = tl.arange(0, SLOTS), tl.arange(0, WIDTH)
    there = slot < slots
    top = tl.load(most + row * slots + slot, mask=there, other=float("-inf"))
    largest = tl.max(top, 0)
    share = tl.exp(top - tl.where(largest == float("-inf"), 0.0, largest))
    sums = tl.sum(share * tl.load(total + row * slots + slot, mask=there, other=0.0), 0)
    part = tl.load(found + (row * slots + slot)[:, None] * WIDTH + column[None, :], mask=there[:, None], other=0.0)
    value = tl.sum(part * share[:, None], 0) / sums
    tl.store(out + row * WIDTH + column, value.to(out.dtype.element_ty))


def decode(
    query: Tensor,
    keys: Side,
    values: Side,
    scaling: float,
    mask: Tensor | None = None,
    newest: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """``softmax(scaling * query keys^T + mask) values``, nothing expanded.

    Args:
        query: [batch, heads, 1, width], heads a multiple of those of the keys.
        keys: [batch, key heads, tokens, width].
        values: [batch, key heads, tokens, width of values].
        scaling: of the scores.
        mask: float [batch, tokens (newest ones too)], added to the scores; or None.
        newest: keys and values in float that follow the stored ones, or None.

    Returns:
        [batch, heads, 1, width of values], of the dtype of the query.
    """
    pairs = [(keys, values)]
    if newest is not None and newest[0].shape[2]:
        pairs.append(_floats(newest))
    batch, heads = query.shape[:2]
    key_heads = keys.codes.shape[1]
    steps = [_steps(side.codes.shape[2], batch * key_heads) for side, _ in pairs]
    counts = [triton.cdiv(side.codes.shape[2], n * _STEP) for (side, _), n in zip(pairs, steps, strict=True)]
    slots = sum(counts)
    most, total = query.new_empty((2, batch * heads, slots), dtype=torch.float32)
    found = query.new_empty((batch * heads, slots, values.width), dtype=torch.float32)
    out = query.new_empty((*query.shape[:3], values.width))
    q, first, done = query.contiguous(), 0, 0
    for (k, v), n, count in zip(pairs, steps, counts, strict=True):
        tokens = k.codes.shape[2]
        part = None if mask is None else mask[:, done : done + tokens].float().contiguous()
        _launch(q, k, v, part, (most, total, found), (first, slots, count, n), scaling)
        first, done = first + count, done + tokens
    _combine[(batch * heads,)](most, total, found, out, slots, WIDTH=values.width, SLOTS=shared(slots))
    return out


def _floats(newest: tuple[Tensor, Tensor]) -> tuple[Side, Side]:
    k, v = Side.of(newest[0]), Side.of(newest[1])
    assert k is not None and v is not None
    return k, v


def _steps(tokens: int, heads: int) -> int:
    """Tiles of tokens a program: a power of two, so that kernels are few, and four programs a multiprocessor."""
    wanted = -(-tokens * heads // (_STEP * 4 * 132))
    return min(64, 1 << max(0, wanted - 1).bit_length())


def _launch(
    q: Tensor, k: Side, v: Side, mask: Tensor | None, into: tuple[Tensor, Tensor, Tensor],
    place: tuple[int, int, int, int], scaling: float,
) -> None:  # fmt: skip
    batch, heads = q.shape[:2]
    key_heads, tokens = k.codes.shape[1:3]
    first, slots, count, steps = place
    group = heads // key_heads
    none = into[0]

    def pointers(side: Side) -> list[Tensor]:
        return [side.codes, *(none if t is None else t for t in (side.scale, side.outer, side.zero))]

    def options(letter: str, side: Side) -> dict[str, object]:
        scales = 0 if side.scale is None else side.scale.shape[-1]
        said = {"CODE": side.code, "FLIP": side.flip, "SCALES": scales, "STORED": side.stored}
        return {f"{letter}{name}": value for name, value in {**said, "ZERO": side.zero is not None}.items()}

    _attend[(batch * key_heads, count)](
        q, *pointers(k), *pointers(v), none if mask is None else mask, *into, tokens, first, slots, scaling,
        GROUP=group, ROWS=shared(group), WIDTH=k.width, VWIDTH=v.width, **options("K", k), **options("V", v),
        MASKED=mask is not None, HEADS=key_heads, STEPS=steps, STEP=_STEP, ASSEMBLED=not INTERPRETED,
        num_warps=4, num_stages=3,
    )  # fmt: skip


def attend(
    query: Tensor,
    keys: Sequence[Tensor],
    key_names: str,
    key_line: str,
    values: Sequence[Tensor],
    value_names: str,
    value_line: str,
    newest_keys: Tensor,
    newest_values: Tensor,
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    """See :func:`nybble.nn.cached_attention.cached_attention`."""
    check_attention("cached_attention", query, keys, values, (newest_keys, newest_values), mask)
    given = (query, keys, key_names, key_line, values, value_names, value_line, newest_keys, newest_values, mask)
    found = _sides((keys, key_names, key_line, newest_keys), (values, value_names, value_line, newest_values))
    tokens = newest_keys.shape[2] + (keys[0].shape[2] if keys else 0)
    of_all_heads = mask is None or (mask.dim() == 4 and mask.shape[1] == 1 and mask.shape[3] == tokens)
    one = query.shape[2] == 1 and newest_keys.shape[2] == newest_values.shape[2]
    if found is None or not of_all_heads or not one or not query.numel():
        expanded: Tensor = cached_attention._init_fn(*given, scaling)
        return expanded
    return decode(query, *found, scaling, _added(mask, query), (newest_keys, newest_values))


def _sides(keys: Rows, values: Rows) -> tuple[Side, Side] | None:
    """Both as the kernel reads them; None where it can't."""
    k, v = stored_rows(*keys), stored_rows(*values)
    if k is None or v is None or Side.of(keys[3]) is None or Side.of(values[3]) is None:
        return None
    sides = Side.of(k), Side.of(v)
    return None if sides[0] is None or sides[1] is None else (sides[0], sides[1])


def _added(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """A mask of one query a sequence, as what is added to the scores: float32 [batch, tokens]."""
    if mask is None:
        return None
    part = mask.expand(query.shape[0], -1, -1, -1)[:, 0, -1]
    return torch.where(part, 0.0, -torch.inf) if part.dtype == torch.bool else part.float()


cached_attention.register_kernel("cuda")(attend)
