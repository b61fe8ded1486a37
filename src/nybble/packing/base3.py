"""Five ternary digits to a byte (1.6 bits each): byte = d0 + 3 d1 + 9 d2 + 27 d3 + 81 d4.

A digit is a code of ``ternary``, with -1 as 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nybble.core.errors import FormatError
from nybble.packing import Layout

if TYPE_CHECKING:
    from torch import Tensor

_POWERS = (1, 3, 9, 27, 81)


def size(count: int, bits: int) -> int:
    """Bytes that ``count`` codes take."""
    _check(bits)
    return -(-count // 5)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Ternary codes (0, 1, and 3 for -1), uint8 [n] -> uint8 [ceil(n / 5)]."""
    import torch

    _check(bits)
    digits = torch.where(codes == 3, 2, codes.int())
    digits = torch.nn.functional.pad(digits, (0, -digits.numel() % 5)).view(-1, 5)
    return (digits * torch.tensor(_POWERS, device=codes.device)).sum(1).to(torch.uint8)


def unpack(data: Tensor, bits: int, count: int) -> Tensor:
    """uint8 [ceil(n / 5)] -> ternary codes, uint8 [n]."""
    import torch

    _check(bits)
    digits = data.int().view(-1, 1) // torch.tensor(_POWERS, device=data.device) % 3
    return torch.where(digits == 2, 3, digits).to(torch.uint8).view(-1)[:count]


def _check(bits: int) -> None:
    if bits != 2:
        raise FormatError(f"packing=base3 stores ternary codes of 2 bits, not codes of {bits} bits; use packing=dense.")


PART = Layout("base3", pack, unpack, size, holds=frozenset((0, 1, 3)))
