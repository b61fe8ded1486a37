"""Tokens in few bits that more tokens are appended to: what a KV cache holds of the keys, or values, of one layer.

A QTensor packs its codes in row-major order, so one token more would move every byte. Here each row (one token of one
head, of the head's width) starts at a byte, and each stored tensor is [batch, heads, tokens, bytes or values of a row]:
appending, cropping, and picking sequences of a batch move bytes and round nothing again. Where a row's codes fill
whole bytes, as they nearly always do, that order *is* the QTensor's; elsewhere the row's last byte is padded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from nybble.core.errors import GranularityError
from nybble.granularity import fitting_sizes
from nybble.packing import get_layout
from nybble.qtensor import QTensor, QuantParams
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer

_PARTS = ("scale", "zero_point", "offset")


class TokenRows:
    """Keys or values of one layer: [batch, heads, tokens, width], all but the newest tokens in few bits.

    Args:
        quantizer: with scales within a token (:class:`nybble.kv_format.KVFormat` sees to it); None stores float.
        residual: newest tokens left in float.
        like: [batch, heads, 0 or more, width], of the dtype that is read back; its values are not used.

    Raises:
        GranularityError: the width can't be cut as the quantizer asks.
    """

    def __init__(self, quantizer: Quantizer | None, residual: int, like: Tensor) -> None:
        if quantizer is not None:
            check_width(quantizer, like.shape[3])
        self.quantizer, self.residual = quantizer, residual
        self.newest = like.new_empty((*like.shape[:2], 0, like.shape[3]))
        self._rows: dict[str, Tensor] = {}
        self._skeleton: BlockQTensor | None = None  # all but the values

    @property
    def rounded(self) -> int:
        """How many tokens are stored in few bits: the oldest ones."""
        return self._rows["codes"].shape[2] if self._rows else 0

    @property
    def tokens(self) -> int:
        """How many tokens are stored."""
        return self.rounded + self.newest.shape[2]

    def append(self, x: Tensor) -> None:
        """Store more tokens [batch, heads, tokens, width]; those that are no longer among the newest are rounded."""
        self.newest = torch.cat([self.newest, x.detach()], 2)
        leaving = self.newest.shape[2] - self.residual
        if self.quantizer is None or leaving <= 0:
            return
        found = self.quantizer.quantize(self.newest[:, :, :leaving])
        self.newest = self.newest[:, :, leaving:].clone()
        rows = _to_rows(found)
        self._rows = {n: torch.cat([self._rows[n], t], 2) if self._rows else _own(t) for n, t in rows.items()}
        self._skeleton = self._skeleton or _skeleton(found)

    def read(self) -> Tensor:
        """All tokens, in the dtype that came in."""
        stored = self.qtensor()
        if stored is None:
            return self.newest
        values = stored.dequantize(self.newest.dtype)
        return torch.cat([values, self.newest], 2) if self.newest.shape[2] else values

    def rows(self) -> dict[str, Tensor]:
        """What is stored in few bits, by name, [batch, heads, tokens, ...] each; empty where nothing is."""
        return dict(self._rows) if self.rounded else {}

    def qtensor(self) -> QTensor | None:
        """The rounded tokens as [batch, heads, tokens, width]; None where there are none."""
        return rows_to_qtensor(self._rows, self._skeleton) if self._skeleton is not None and self.rounded else None

    def drop_oldest(self, count: int) -> None:
        """Forget the first tokens."""
        old = min(count, self.rounded)
        self._each(lambda t: t[:, :, old:], lambda t: t[:, :, count - old :], count)

    def drop_newest(self, count: int) -> None:
        """Forget the last tokens; what was rounded stays so, even if it is among the newest now."""
        recent = min(count, self.newest.shape[2])
        left = max(0, self.rounded - (count - recent))
        self._each(lambda t: t[:, :, :left], lambda t: t[:, :, : t.shape[2] - recent], count)

    def select(self, batch: Tensor) -> None:
        """Take these sequences [n] of the batch, in this order; one may come several times."""
        chosen = batch.to(self.newest.device)
        self._each(lambda t: t[chosen], lambda t: t[chosen], 1)

    def tensors(self) -> dict[str, Tensor]:
        """What takes memory, by name: ``codes``, ``scale`` ..., ``newest``."""
        return {**self._rows, "newest": self.newest}

    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def _each(self, rounded: Callable[[Tensor], Tensor], newest: Callable[[Tensor], Tensor], count: int) -> None:
        if count <= 0:
            return
        self._rows = {name: _own(rounded(t)) for name, t in self._rows.items()}
        self.newest = _own(newest(self.newest))


def check_width(quantizer: Quantizer, width: int) -> None:
    """Raise GranularityError when rows of ``width`` can't be cut as the quantizer asks."""
    try:
        quantizer.granularity.check((1, 1, 1, width))
    except GranularityError as error:
        raise GranularityError(
            f"{quantizer}: a row of the KV cache is one head wide, {width} values, and '{quantizer.granularity}' does "
            f"not divide it. Sizes that do: {fitting_sizes(width)}. Or 'token' for one scale a row."
        ) from error


def _own(x: Tensor) -> Tensor:
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


def _to_rows(stored: BlockQTensor) -> dict[str, Tensor]:
    """Its tensors as [batch, heads, tokens, bytes or values], under dotted names."""
    codes, layout = stored.codes, get_layout(stored.layout)
    full, all_bytes, needed = _row(stored)
    if full != stored.shape[-1]:
        padded = torch.nn.functional.pad(stored.unpacked(), (0, full - stored.shape[-1]))
        codes = layout.pack(padded.reshape(-1), stored.format.bits)
    found = {"codes": codes.reshape(*stored.shape[:-1], all_bytes)[..., :needed]}
    for name, value in _parts(stored):
        inner = {"": value} if isinstance(value, Tensor) else _to_rows(value)
        found |= {f"{name}.{key}" if key else name: tensor for key, tensor in inner.items()}
    return found


def rows_to_qtensor(rows: Mapping[str, Tensor], like: BlockQTensor, prefix: str = "") -> BlockQTensor:
    """Inverse of :func:`_to_rows`; the number of tokens is that of the rows."""
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
    return _skeleton(quantizer.quantize(torch.zeros(1, 1, 1, width)))


def _skeleton(stored: BlockQTensor) -> BlockQTensor:
    """The same without its values, and without a divisor, which only rounding needs."""
    empty: dict[str, Tensor | BlockQTensor] = {
        name: value.new_empty(0) if isinstance(value, Tensor) else _skeleton(value) for name, value in _parts(stored)
    }
    return replace(stored, codes=stored.codes.new_empty(0), params=_params(empty))


def _params(parts: Mapping[str, Tensor | BlockQTensor]) -> QuantParams:
    return QuantParams(parts.get("scale"), parts.get("zero_point"), parts.get("offset"))
