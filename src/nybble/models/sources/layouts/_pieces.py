"""QTensors from the pieces that layouts share: streams of codes in 32-bit words, plain scales, integer zero points."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from nybble.core.errors import FileError
from nybble.formats import get_format
from nybble.granularity import Granularity, make_granularity
from nybble.packing import get_layout
from nybble.qtensor import Inverse, QTensor, QuantParams
from nybble.qtensor.block import BlockQTensor
from nybble.qtensor.split import SplitQTensor

E2M1, E4M3, E8M0 = "float4_e2m1fn", "float8_e4m3fn", "float8_e8m0fnu"


def stream_rows(stored: Tensor, bits: int, columns: int) -> Tensor:
    """int32 [rows, words], codes as a little-endian stream in each row -> uint8 [rows, columns]."""
    rows, count = stored.shape
    data = stored.reshape(-1).view(torch.uint8).view(rows, 4 * count)  # one word a row may have any stride
    per = 32 * count // bits  # what is behind the last whole code is padding
    if 32 * count % bits == 0:
        return get_layout("dense").unpack(data.reshape(-1), bits, rows * per).view(rows, per)[:, :columns]
    wide = functional.pad(data, (0, -4 * count % bits))
    per = wide.shape[1] * 8 // bits
    return get_layout("dense").unpack(wide.reshape(-1), bits, rows * per).view(rows, per)[:, :columns]


def packed(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes of any shape as a QTensor keeps them."""
    found: Tensor = get_layout("dense").pack(codes.contiguous().reshape(-1), bits)
    return found


def flipped(data: Tensor, bits: int) -> Tensor:
    """A dense stream of codes with the highest bit of each flipped; the pattern repeats after ``bits`` bytes."""
    pattern = sum(1 << (i * bits + bits - 1) for i in range(8)).to_bytes(bits, "little")
    if len(set(pattern)) == 1:
        return data ^ pattern[0]
    mask = torch.tensor(list(pattern), dtype=torch.uint8, device=data.device)
    return data ^ mask.repeat(math.ceil(data.numel() / bits))[: data.numel()]


def signed_codes(values: Tensor, bits: int) -> Tensor:
    """int8 integers as two's complement of ``bits`` bits, uint8.

    Raises:
        FileError: one needs more.
    """
    half = 1 << (bits - 1)
    if bits < 8 and values.device.type != "meta" and bool(((values < -half) | (values >= half)).any()):
        raise FileError(f"integers beyond the {-half} .. {half - 1} of {bits} bits.")
    return values.contiguous().view(torch.uint8) & ((1 << bits) - 1)


def integers(codes: Tensor, name: str) -> BlockQTensor:
    """Zero points: plain codes of a format, no scale."""
    fmt = get_format(name)
    shape = tuple(codes.shape)
    return BlockQTensor(fmt, make_granularity("tensor"), shape, packed(codes, fmt.bits), QuantParams(None))


def block(
    name: str, granularity: str, shape: tuple[int, int], codes: Tensor, scale: Tensor, zero_point: QTensor | None = None
) -> BlockQTensor:
    """Codes (packed) under plain scales; one of NaN or Inf isn't refused: it is what the file says."""
    cut = make_granularity(granularity)
    return BlockQTensor(
        get_format(name), cut, shape, codes, QuantParams(_shaped(scale, cut, shape), zero_point=zero_point)
    )


def nvfp4(
    shape: tuple[int, int], codes: Tensor, scale: Tensor, outer: Tensor, *, divides: bool, size: int = 16
) -> BlockQTensor:
    """E2M1 in groups of ``size`` under E4M3 scales and one float32, by which these are multiplied or ``divides``."""
    one = outer.float().reshape(1, 1)
    params = QuantParams(Inverse(one) if divides else one)
    count = (shape[0], shape[1] // size)
    inner = BlockQTensor(get_format(E4M3), make_granularity("tensor"), count, _bytes(scale), params)
    return BlockQTensor(get_format(E2M1), make_granularity(f"group={size}"), shape, _bytes(codes), QuantParams(inner))


def mx(name: str, shape: tuple[int, int], codes: Tensor, scale: Tensor) -> BlockQTensor:
    """Codes in groups of 32 under powers of two."""
    count = (shape[0], shape[1] // 32)
    inner = BlockQTensor(get_format(E8M0), make_granularity("tensor"), count, _bytes(scale), QuantParams(None))
    return BlockQTensor(get_format(name), make_granularity("group=32"), shape, _bytes(codes), QuantParams(inner))


def group_word(size: int, columns: int) -> str:
    """The granularity of groups of ``size`` columns, the last of which may be short; -1: rows."""
    if size in (-1, columns):
        return "channel"
    return f"group={size}" + (" pad=true" if columns % size else "")


def in_order(index: Tensor, size: int) -> Tensor | None:
    """The columns as a quantizer in groups saw them: a permutation int32 [columns], None where it is the identity.

    Args:
        index: int32 [columns], the group of each column (``g_idx``).
        size: of a group.

    Raises:
        FileError: groups of other sizes.
    """
    columns = index.numel()
    plain = torch.arange(columns, dtype=torch.int64) // size
    if torch.equal(index.long(), plain):
        return None
    order = torch.argsort(index.long(), stable=True)
    if not torch.equal(index.long()[order], plain):
        raise FileError(f"g_idx puts columns into groups that don't have {size} each.")
    return order.int()


def reordered(tensor: BlockQTensor, order: Tensor | None) -> QTensor:
    """A tensor whose columns are in the order of a quantizer, as the layer has them."""
    return tensor if order is None else SplitQTensor(tensor.shape, 1, order, (tensor,))


def _shaped(scale: Tensor, cut: Granularity, shape: tuple[int, int]) -> Tensor:
    return scale.reshape(cut.scale_shape(shape)).contiguous()


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8).reshape(-1)
