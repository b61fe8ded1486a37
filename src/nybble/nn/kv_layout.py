"""Tokens of a KV cache as rows of bytes: [batch, heads, tokens, bytes or values of a row], and a QTensor over them.

A QTensor packs its codes in row-major order, so one token more would move every byte. Here each row (one token of one
head, of the head's width) starts at a byte. Where a row's codes fill whole bytes, as they nearly always do, that order
*is* the QTensor's; elsewhere the row's last byte is padded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from nybble.kv_format import tokens_a_scale
from nybble.packing import get_layout
from nybble.qtensor import QuantParams
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer

_PARTS = ("scale", "zero_point", "offset")


def own(x: Tensor) -> Tensor:
    """The tensor in memory of its own: a view would keep all of what it was cut from."""
    return x.contiguous() if x.untyped_storage().nbytes() == x.numel() * x.element_size() else x.clone()


def _row(stored: BlockQTensor) -> tuple[int, int, int]:
    """The least width at or above a row's whose codes fill whole bytes, these bytes, and those that the row needs."""
    size, bits, width = get_layout(stored.layout).size, stored.format.bits, stored.shape[-1]
    full = width
    while size(8 * full, bits) != 8 * size(full, bits):
        full += 1
    return full, size(full, bits), size(width, bits)


def _parts(stored: BlockQTensor) -> Iterator[tuple[str, Tensor | BlockQTensor]]:
    for name in _PARTS:
        value = getattr(stored.params, name)
        if value is not None:
            assert isinstance(value, Tensor | BlockQTensor)  # factored and inverse scales are of whole tensors
            yield name, value


def to_rows(stored: BlockQTensor) -> dict[str, Tensor]:
    """Its tensors as [batch, heads, tokens, bytes or values], under dotted names."""
    codes, layout = stored.codes, get_layout(stored.layout)
    full, all_bytes, needed = _row(stored)
    if full != stored.shape[-1]:
        padded = torch.nn.functional.pad(stored.unpacked(), (0, full - stored.shape[-1]))
        codes = layout.pack(padded.reshape(-1), stored.format.bits)
    found = {"codes": codes.reshape(*stored.shape[:-1], all_bytes)[..., :needed]}
    for name, value in _parts(stored):
        inner = {"": value} if isinstance(value, Tensor) else to_rows(value)
        found |= {f"{name}.{key}" if key else name: tensor for key, tensor in inner.items()}
    return found


def rows_to_qtensor(rows: Mapping[str, Tensor], like: BlockQTensor, prefix: str = "") -> BlockQTensor:
    """Inverse of :func:`to_rows`; the number of tokens is that of the rows."""
    codes, layout, bits = rows[f"{prefix}codes"], get_layout(like.layout), like.format.bits
    shape = (*codes.shape[:-1], like.shape[-1])
    full, all_bytes, needed = _row(like)
    if full != shape[-1]:
        padded = torch.nn.functional.pad(codes, (0, all_bytes - needed)).reshape(-1)
        unpacked = layout.unpack(padded, bits, math.prod(shape[:-1]) * full).reshape(-1, full)
        codes = layout.pack(unpacked[:, : shape[-1]].reshape(-1), bits)
    params: dict[str, Tensor | BlockQTensor] = {}
    for name, value in _parts(like):
        key = f"{prefix}{name}"
        params[name] = rows[key] if isinstance(value, Tensor) else rows_to_qtensor(rows, value, f"{key}.")
    return replace(like, shape=shape, codes=codes.reshape(-1), params=_params(params))


def skeleton_of(quantizer: Quantizer, width: int) -> BlockQTensor:
    """What all rows of a width have in common, whatever their values."""
    return _skeleton(quantizer.quantize(torch.zeros(1, 1, tokens_a_scale(quantizer), width)))


def _skeleton(stored: BlockQTensor) -> BlockQTensor:
    """The same without its values, and without a divisor, which only rounding needs."""
    empty: dict[str, Tensor | BlockQTensor] = {
        name: value.new_empty(0) if isinstance(value, Tensor) else _skeleton(value) for name, value in _parts(stored)
    }
    return replace(stored, codes=stored.codes.new_empty(0), params=_params(empty))


def _params(parts: Mapping[str, Tensor | BlockQTensor]) -> QuantParams:
    return QuantParams(parts.get("scale"), parts.get("zero_point"), parts.get("offset"))
