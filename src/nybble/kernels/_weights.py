"""A BlockQTensor as the compiled CPU kernels read it: pointers to its own tensors, nothing expanded."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nybble.formats.integer import IntFormat
from nybble.kernels._places import blocks_of, outer_block
from nybble.ops.rounding import decode_table
from nybble.qtensor import QTensor, dense
from nybble.qtensor.block import BlockQTensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CODES = 3
_TABLE, _MIRROR, _LINEAR, _FLOAT = range(4)


class _Side(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("dtype", ctypes.c_int64), ("bits", ctypes.c_int64), ("table", ctypes.c_void_p),
        ("outer", ctypes.c_void_p), ("outer_block", ctypes.c_int64), ("size", ctypes.c_int64),
        ("add", ctypes.c_float), ("absent", ctypes.c_float),
    )  # fmt: skip


class _Weight(ctypes.Structure):
    _fields_ = (
        ("codes", ctypes.c_void_p), ("table", ctypes.c_void_p), ("n", ctypes.c_int64), ("k", ctypes.c_int64),
        ("bits", ctypes.c_int64), ("kind", ctypes.c_int64), ("group", ctypes.c_int64), ("row_blocks", ctypes.c_int64),
        ("row_share", ctypes.c_int64), ("affine", ctypes.c_int64), ("exact", ctypes.c_int64),
        ("base", ctypes.c_float), ("flip", ctypes.c_int32),
        ("scale", _Side), ("zero", _Side), ("offset", _Side), ("steps", ctypes.c_int64), ("careful", ctypes.c_int64),
        ("from", ctypes.c_int64), ("room", ctypes.c_int64), ("shift", ctypes.c_int32), ("direct", ctypes.c_int32),
    )  # fmt: skip


class Weight:
    """What the library needs of one matrix; it lives as long as the tensors that it points to, which it holds.

    Args:
        record: for the library.
        kept: the tensors.
        signed: whether its codes are signed integers; None: they are no integers.
    """

    def __init__(self, record: _Weight, kept: Sequence[Tensor], signed: bool | None) -> None:
        self._record, self._kept, self.signed = record, tuple(kept), signed
        self.address = ctypes.addressof(record)
        self.n, self.k = int(record.n), int(record.k)


def weight_of(qtensor: QTensor, prepare: Any) -> Weight | str:
    """The record of a QTensor, or why the library can't multiply with it.

    Args:
        qtensor: on the CPU.
        prepare: the library's function that completes a record.
    """
    if not isinstance(qtensor, BlockQTensor):
        return f"weights of the kind {qtensor.kind}"
    bits = qtensor.format.bits
    if len(qtensor.shape) != 2 or math.prod(qtensor.shape) == 0:
        return f"a shape of {list(qtensor.shape)}"
    if bits not in (1, 2, 3, 4, 5, 6, 8) or qtensor.layout != "dense":
        return f"codes of {bits} bits in the layout {qtensor.layout}"
    n, k = qtensor.shape
    blocks = blocks_of(str(qtensor.granularity), n, k)
    uneven = blocks is not None and (k % blocks[1] or (blocks[0] % 16 and blocks[1] > 1))
    if blocks is None or uneven or k * bits % 8:
        return f"scales by {qtensor.granularity} of {k} columns"
    kept: list[Tensor] = [_contiguous(qtensor.codes)]
    table = (
        decode_table(qtensor.format.name, torch.device("cpu")) if qtensor.params.grid is None else qtensor.params.grid
    )
    table = _contiguous(table.float())
    if table.numel() != 2**bits:
        return f"{table.numel()} values in {bits} bits"
    kept.append(table)
    record = _Weight(codes=kept[0].data_ptr(), table=table.data_ptr(), n=n, k=k, bits=bits)
    record.group, record.row_blocks, record.row_share = blocks
    record.kind, record.flip, record.base = _kind(table, bits, kept[0])
    params, count = qtensor.params, blocks[1] * (n // blocks[2])
    for name, value, absent in (
        ("scale", params.scale, 1.0),
        ("zero", params.zero_point, 0.0),
        ("offset", params.offset, 0.0),
    ):
        side = _side(value, absent, count, kept)
        if isinstance(side, str):
            return f"{name} {side}"
        setattr(record, name, side)
    record.affine = params.zero_point is not None or params.offset is not None
    finite = table[table.isfinite()]
    whole = params.zero_point is None or _signed(qtensor) is not None  # zero points of 8 bits at most
    record.exact = whole and torch.equal(finite.bfloat16().float(), finite)
    if prepare(ctypes.addressof(record)):
        return f"scales by {qtensor.granularity} of {k} columns"
    return Weight(record, kept, _signed(qtensor))


def _signed(qtensor: BlockQTensor) -> bool | None:
    """Of a weight that is integers, zero points too, times scales."""
    fmt, zero = qtensor.format, qtensor.params.zero_point
    whole = isinstance(zero, BlockQTensor) and zero.format == fmt and zero.params.scale is None
    if not isinstance(fmt, IntFormat) or qtensor.params.grid is not None or not (zero is None or whole):
        return None
    return fmt.is_signed


def _contiguous(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous()


def _kind(table: Tensor, bits: int, stored: Tensor) -> tuple[int, int, float]:
    """How values are found without looking all of them up: what, and its ``flip`` and ``base`` (``packed.cpp``)."""
    if bits != 8:
        return _TABLE, 0, 0.0
    codes = torch.arange(256)
    for flip in (0, 128):
        base = float(table[flip])
        if torch.equal(table, ((codes ^ flip) + base).float()):
            return _LINEAR, flip, base
    lower, finite = table[:128], table[:128].isfinite()
    mirrored = torch.equal(lower[finite], -table[128:][finite]) and bool((table[128:].isfinite() == finite).all())
    if not mirrored:
        return _TABLE, 0, 0.0
    for mantissa in range(1, 7):
        shift = 23 - mantissa
        plain = (codes[:128].int() << shift).view(torch.float32)
        factor = float(lower[1 << mantissa]) / float(plain[1 << mantissa])  # of the smallest normal number
        exact = torch.equal((plain * factor)[finite], lower[finite])
        if exact and (finite.all() or bool(torch.cat([finite, finite])[stored.long()].all())):
            return _FLOAT, shift, factor
    return _MIRROR, 0, 0.0


def _side(value: Any, absent: float, count: int, kept: list[Tensor]) -> _Side | str:
    """Of a scale, zero point or offset of ``count`` blocks; or what it is that can't be read."""
    side = _Side(absent=absent, size=count)
    if value is None:
        return side
    if isinstance(value, Tensor):
        if value.dtype not in DTYPES:
            value = value.float()
        if value.numel() != count:  # one mean for all
            value = value.float().expand(count) if value.numel() == 1 else value
        if value.numel() != count:
            return f"of {value.numel()} values for {count} blocks"
        kept.append(_contiguous(value))
        side.data, side.dtype = kept[-1].data_ptr(), DTYPES[value.dtype]
        return side
    if not isinstance(value, BlockQTensor):
        return f"of the kind {getattr(value, 'kind', type(value).__name__)}"
    params, bits = value.params, value.format.bits
    if bits > 8 or value.layout != "dense" or params.zero_point is not None or math.prod(value.shape) != count:
        return f"in {value.format.name}"
    if params.offset is not None:
        offset = dense(params.offset)
        if offset.numel() != 1:
            return "with offsets of its own"
        side.add = float(offset)
    table = decode_table(value.format.name, torch.device("cpu")) if params.grid is None else params.grid
    kept += [_contiguous(value.codes), _contiguous(table.float())]
    side.data, side.dtype, side.bits, side.table = kept[-2].data_ptr(), _CODES, bits, kept[-1].data_ptr()
    if params.scale is not None:
        if not isinstance(params.scale, Tensor | QTensor):
            return "with factors"
        outer = dense(params.scale).float().reshape(-1)
        size = outer_block(str(value.granularity), value.shape, outer.numel())
        if size is None:
            return f"by {value.granularity}"
        kept.append(_contiguous(outer))
        side.outer, side.outer_block = kept[-1].data_ptr(), size
    return side
