"""A little-endian stream of bits: code i occupies bits ``i * bits .. (i + 1) * bits - 1``.

No bit is lost but in the last byte.

::

    3 bits:  byte 0            byte 1            byte 2
             c2 c2 c1 c1 c1 c0 c0 c0   c5 c4 c4 c4 c3 c3 c3 c2   c7 c7 c7 c6 c6 c6 c5 c5      (bit 7 left, bit 0 right)

For 4 bits that is "low nibble first", as compressed-tensors and most of the field have it. Two of
four bits and four of two are pushed together in a word of as many bytes; of others eight fill ``bits`` bytes, so they
are in a 64-bit word: pairs of bytes, pairs of these, and the two halves. Codes of more than 8 bits take two bytes
each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nybble.packing import Layout

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_CHUNK = 1 << 18


def size(count: int, bits: int) -> int:
    """Bytes that ``count`` codes take."""
    return 2 * count if bits > 8 else -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 (int32 above 8 bits) [n] -> uint8 [size(n, bits)]."""
    import torch

    if bits > 8:
        return codes.to(torch.int16).view(torch.uint8)
    if bits == 8:
        return codes.clone()
    count = codes.numel()
    if codes.is_meta:  # a description: nothing is calculated, however long it is
        return codes.new_empty(size(count, bits))
    if bits in (2, 4):
        word = _words(codes, torch.int16 if bits == 4 else torch.int32)
        word = word | word >> (8 - bits)
        return (word if bits == 4 else word | word >> 2 * (8 - bits)).to(torch.uint8)
    out = torch.empty(-(-count // 8), bits, dtype=torch.uint8, device=codes.device)
    for start in range(0, count, _CHUNK):
        word = _words(codes[start : start + _CHUNK], torch.int64)
        for half in (8, 16, 32):  # two numbers of bits * half / 8 bits in every 2 half bits become one
            used = bits * half // 8
            low = _mask(used, 2 * half)
            word = word & low | word >> (half - used) & low << used
        out[start // 8 : start // 8 + len(word)] = word.view(-1, 1).view(torch.uint8)[:, :bits]
    whole = out.view(-1)[: size(count, bits)]
    return whole.clone() if whole.numel() < out.numel() else whole  # no tail that a file would keep


def unpack(data: Tensor, bits: int, count: int) -> Tensor:
    """uint8 [size(n, bits)] -> uint8 (int32 above 8 bits) [n]."""
    import torch

    if bits > 8:
        return data[::2].int() | data[1::2].int() << 8
    if bits == 8:
        return data
    if data.is_meta:
        return data.new_empty(count)
    if bits in (2, 4):
        word = data.to(torch.int16 if bits == 4 else torch.int32)
        if bits == 2:
            word = word | word << 2 * (8 - bits)
        word = (word | word << (8 - bits)) & _mask(bits, 8, 64 // bits)
        return word.view(torch.uint8)[:count]
    out = torch.empty(-(-count // 8), 8, dtype=torch.uint8, device=data.device)
    step = _CHUNK // 8 * bits
    for begin in range(0, data.numel(), step):
        part = data[begin : begin + step]
        part = torch.nn.functional.pad(part, (0, -part.numel() % bits)).view(-1, bits)
        word = torch.nn.functional.pad(part, (0, 8 - bits)).view(torch.int64).view(-1)
        for half in (32, 16, 8):
            used = bits * half // 8
            low = _mask(used, 2 * half)
            word = word & low | (word & low << used) << (half - used)
        out[begin // bits : begin // bits + len(word)] = word.view(-1, 1).view(torch.uint8)
    return out.view(-1)[:count]


def _words(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Neighbouring codes as integers of ``dtype``, the last ones filled up with zeros."""
    import torch

    size = dtype.itemsize
    if codes.numel() % size:
        codes = torch.nn.functional.pad(codes, (0, -codes.numel() % size))
    if codes.storage_offset() % size or not codes.is_contiguous():
        codes = codes.clone(memory_format=torch.contiguous_format)
    return codes.view(dtype)


def _mask(bits: int, width: int, total: int = 64) -> int:
    """The low ``bits`` of every ``width`` of ``total``."""
    return sum(((1 << bits) - 1) << start for start in range(0, total, width))


PART = Layout("dense", pack, unpack, size)
