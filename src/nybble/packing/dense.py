"""A little-endian stream of bits: code i occupies bits ``i * bits .. (i + 1) * bits - 1``.

No bit is lost but in the last byte.

::

    3 bits:  byte 0            byte 1            byte 2
             c2 c2 c1 c1 c1 c0 c0 c0   c5 c4 c4 c4 c3 c3 c3 c2   c7 c7 c7 c6 c6 c6 c5 c5      (bit 7 left, bit 0 right)

For 4 bits that is "low nibble first", as compressed-tensors and most of the field have it. Where codes divide a byte
they are shifted into place; elsewhere eight codes fill ``bits`` bytes, so eight at a time are gathered in one 64-bit
word. Codes of more than 8 bits take two bytes each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nybble.packing import Layout

if TYPE_CHECKING:
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
    if bits in (1, 2, 4):
        per = 8 // bits
        rows = torch.nn.functional.pad(codes, (0, -count % per)).view(-1, per)
        data = rows[:, 0].clone()
        for place in range(1, per):
            data |= rows[:, place] << (place * bits)
        return data
    out = torch.empty(-(-count // 8) * bits, dtype=torch.uint8, device=codes.device)
    shifts = torch.arange(0, 8 * bits, bits, device=codes.device)
    for start in range(0, count, _CHUNK):
        part = codes[start : start + _CHUNK]
        part = torch.nn.functional.pad(part, (0, -part.numel() % 8)).view(-1, 8)
        words = (part.long() << shifts).sum(1, dtype=torch.int64)  # disjoint bits: the sum is the union
        begin = start // 8 * bits
        out[begin : begin + words.numel() * bits] = words.view(-1, 1).view(torch.uint8)[:, :bits].reshape(-1)
    return out[: size(count, bits)].clone()


def unpack(data: Tensor, bits: int, count: int) -> Tensor:
    """uint8 [size(n, bits)] -> uint8 (int32 above 8 bits) [n]."""
    import torch

    if bits > 8:
        return data[::2].int() | data[1::2].int() << 8
    if bits == 8:
        return data
    if bits in (1, 2, 4):
        columns = [(data >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
        return torch.stack(columns, 1).view(-1)[:count]
    out = torch.empty(-(-count // 8) * 8, dtype=torch.uint8, device=data.device)
    shifts = torch.arange(0, 8 * bits, bits, device=data.device)
    mask = 2**bits - 1
    step = _CHUNK // 8 * bits
    for begin in range(0, data.numel(), step):
        part = data[begin : begin + step]
        part = torch.nn.functional.pad(part, (0, -part.numel() % bits)).view(-1, bits)
        words = torch.zeros(part.shape[0], 8, dtype=torch.uint8, device=data.device)
        words[:, :bits] = part
        codes = (words.view(torch.int64) >> shifts) & mask
        start = begin // bits * 8
        out[start : start + codes.numel()] = codes.to(torch.uint8).view(-1)
    return out[:count]


PART = Layout("dense", pack, unpack, size)
