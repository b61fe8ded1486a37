"""Dequantizing a large matrix some rows at a time: the numbers of the plain way, without its passes over memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nybble.ops.rounding import decode_table
from nybble.qtensor import Inverse, QTensor, dense

if TYPE_CHECKING:
    from nybble.qtensor.block import BlockQTensor

_LEAST = 1 << 16  # elements of a matrix that is worth it
_ROWS = 1 << 17  # elements at a time: they stay in the cache


def by_rows(tensor: BlockQTensor, dtype: torch.dtype) -> Tensor | None:
    """What ``tensor.dequantize(dtype)`` is, bit for bit; None where :func:`row_pieces` gives none."""
    pieces = row_pieces(tensor)
    if pieces is None:
        return None
    out = torch.empty(tensor.shape, dtype=dtype)
    for rows, values in pieces:
        out[rows] = values
    return out


def rows_of(tensor: QTensor) -> Iterator[Tensor]:
    """What ``tensor.dequantize()`` is, float32, some rows at a time; of a tensor that can't be cut so, all of them."""
    from nybble.qtensor.block import BlockQTensor

    pieces = row_pieces(tensor) if isinstance(tensor, BlockQTensor) else None
    if pieces is None:
        yield tensor.dequantize()
    else:
        yield from (values for _, values in pieces)


def row_pieces(tensor: BlockQTensor) -> Iterator[tuple[slice, Tensor]] | None:
    """The values of a matrix, some rows at a time in order: which, and float32 [rows, columns]; None where it is none.

    It is one for matrices on the CPU of 4 or 8 bits, with plain rows of codes and scales of rows or groups of columns.
    """
    params, shape, bits = tensor.params, tensor.shape, tensor.format.bits
    if type(tensor.codes) is not Tensor or tensor.codes.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    if len(shape) != 2 or shape[0] * shape[1] < _LEAST or bits not in (4, 8) or tensor.layout != "dense":
        return None
    if shape[1] * bits % 8 or params.grid is not None or params.scale is None:
        return None
    sides = [
        params.scale.divisor if isinstance(params.scale, Inverse) else params.scale,
        params.zero_point,
        params.offset,
    ]
    if any(side is not None and not isinstance(side, Tensor | QTensor) for side in sides):
        return None
    groups = _groups(tensor)
    parts = [dense(side) if isinstance(side, Tensor | QTensor) else None for side in sides]
    if not groups or any(part is not None and part.requires_grad for part in parts):
        return None
    scale, zero, offset = (None if part is None else _spread(part, shape[0], groups) for part in parts)
    assert scale is not None
    return _pieces(tensor, groups, scale, zero, offset)


def _pieces(
    tensor: BlockQTensor, groups: int, scale: Tensor, zero: Tensor | None, offset: Tensor | None
) -> Iterator[tuple[slice, Tensor]]:
    shape, divides = tensor.shape, isinstance(tensor.params.scale, Inverse)
    codes = tensor.codes.view(shape[0], -1)
    step = max(1, _ROWS // shape[1])
    for start in range(0, shape[0], step):
        rows = slice(start, start + step)
        values = _values(codes[rows], tensor).view(-1, groups, shape[1] // groups)
        if zero is not None:
            values.sub_(zero[rows])
        values = values.div_(scale[rows]) if divides else values.mul_(scale[rows])
        if offset is not None:
            values.add_(offset[rows])
        yield rows, values.view(-1, shape[1])


def _groups(tensor: BlockQTensor) -> int:
    """Scales in a row; 0 where they aren't of neighbouring columns of one row, or one for all."""
    if tensor.granularity.factored or tensor.granularity.uneven(tensor.shape):
        return 0
    found = tensor.granularity.scale_shape(tensor.shape)
    word = str(tensor.granularity).split("=")[0].split()[0]
    if word not in ("group", "channel", "tensor") or len(found) != 2 or tensor.shape[1] % found[1]:
        return 0
    return int(found[1])


def _spread(value: Tensor, rows: int, groups: int) -> Tensor:
    return value.expand(rows, groups)[..., None] if value.numel() == 1 else value.view(rows, groups, 1)


def _values(codes: Tensor, tensor: BlockQTensor) -> Tensor:
    """float32, of a few rows of packed codes."""
    if tensor.format.bits == 8:
        return torch.index_select(decode_table(tensor.format.name, codes.device), 0, codes.reshape(-1).int())
    pairs = _pairs(tensor.format.name)
    return torch.index_select(pairs, 0, codes.reshape(-1).int()).view(torch.float32)


@cache
def _pairs(name: str) -> Tensor:
    """int64 [256]: the values of the two codes of a byte, as the bits of two float32."""
    table, byte = decode_table(name, torch.device("cpu")), torch.arange(256)
    return torch.stack([table[byte & 15], table[byte >> 4]], 1).contiguous().view(torch.int64).view(-1)
