"""Packed matrices one below the other: of one kind as one tensor, others side by side in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nybble.packing import get_layout
from nybble.qtensor import Inverse, QTensor, QuantParams
from nybble.qtensor.block import BlockQTensor
from nybble.qtensor.split import SplitQTensor, pack_members


def rows_joined(parts: Sequence[QTensor]) -> QTensor:
    """The matrix whose rows are those of ``parts``, with every code and scale that they have.

    Args:
        parts: of as many columns each.

    Returns:
        a block tensor where the parts are such, of one format and granularity, and share what is one for all of a part
        (NVFP4's outer scale, a scale of the tensor); else a split one.
    """
    if len(parts) == 1:
        return parts[0]
    found = _block(parts)
    if found is not None:
        return found
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    members = torch.cat([torch.full((part.shape[0],), i, dtype=torch.uint8) for i, part in enumerate(parts)])
    return SplitQTensor(shape, 0, pack_members(members, len(parts)), tuple(parts))


def _block(parts: Sequence[QTensor]) -> BlockQTensor | None:
    """As one tensor; None where that can't be."""
    blocks = [part for part in parts if isinstance(part, BlockQTensor)]
    first = blocks[0] if len(blocks) == len(parts) else None
    if first is None or any(not _alike(first, part) for part in blocks):
        return None
    kind, _, size = str(first.granularity).partition("=")
    high = int(size.partition("x")[0]) if kind == "block" else 1
    if kind not in ("channel", "group", "block", "tensor") or any(part.shape[0] % high for part in blocks[:-1]):
        return None
    params: dict[str, Any] = {}
    for name in ("scale", "zero_point"):
        values = [getattr(part.params, name) for part in blocks]
        joined = _same(values) if kind == "tensor" else _stacked(values)
        if joined is None and values[0] is not None:
            return None
        params[name] = joined
    shape = (sum(part.shape[0] for part in blocks), first.shape[1])
    codes = torch.cat([part.unpacked() for part in blocks])
    packed = get_layout(first.layout).pack(codes.reshape(-1), first.format.bits)
    return BlockQTensor(first.format, first.granularity, shape, packed, QuantParams(**params), first.layout)


def _alike(a: BlockQTensor, b: BlockQTensor) -> bool:
    plain = all(getattr(part.params, name) is None for part in (a, b) for name in ("offset", "thresholds", "grid"))
    return plain and (a.format, str(a.granularity), a.layout) == (b.format, str(b.granularity), b.layout)


def _same(values: Sequence[Any]) -> Any:
    """The one that all are; None where they differ."""
    first = values[0]
    if isinstance(first, Tensor) and all(isinstance(v, Tensor) and torch.equal(first, v) for v in values):
        return first
    if isinstance(first, Inverse) and all(isinstance(v, Inverse) for v in values):
        return first if _same([v.divisor for v in values]) is not None else None
    if isinstance(first, QTensor) and all(isinstance(v, QTensor) and v.spec() == first.spec() for v in values):
        found = [v.tensors() for v in values]
        return first if all(torch.equal(t, f[n]) for f in found for n, t in found[0].items()) else None
    return None


def _stacked(values: Sequence[Any]) -> Any:
    """Scales of rows, one below the other; codes of them where they share what is above."""
    first = values[0]
    if all(isinstance(v, Tensor) and v.dtype == first.dtype for v in values):
        return torch.cat(list(values))
    if not all(isinstance(v, BlockQTensor) and str(v.granularity) == "tensor" and _alike(first, v) for v in values):
        return None
    outer = [v.params.scale for v in values]
    if any(v.params.zero_point is not None for v in values) or (outer[0] is not None and _same(outer) is None):
        return None
    if outer[0] is None and any(v is not None for v in outer):
        return None
    shape = (sum(v.shape[0] for v in values), *first.shape[1:])
    codes = torch.cat([v.unpacked() for v in values])
    packed = get_layout(first.layout).pack(codes.reshape(-1), first.format.bits)
    return BlockQTensor(first.format, first.granularity, shape, packed, QuantParams(outer[0]), first.layout)
