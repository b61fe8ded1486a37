"""Codes of four bits, two to a byte, put into another order without a byte for each.

::

    low   c1c0  c3c2 ...     high   d1d0  d3d2 ...     (the first of two codes in the low half of a byte)
    a byte of each side by side   d1 d0 c1 c0     and with the middle two exchanged   d1 c1 d0 c0
"""

from __future__ import annotations

from typing import Any

import numpy as np

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
_PAIR = np.dtype("<u2")
CHUNK = 1 << 17
"""Bytes that are best given at a time: what is made of them stays in the cache, and in memory that is used again."""


def interleave(low: Bytes, high: Bytes) -> Bytes:
    """Byte k gets code k of ``low`` in its low half and code k of ``high`` in the other.

    Args:
        low: uint8 [..., n], two codes in a byte.
        high: uint8 [..., n].

    Returns:
        uint8 [..., 2n].

    >>> [hex(byte) for byte in interleave(np.uint8([0x10, 0x32]), np.uint8([0x54, 0x76]))]
    ['0x40', '0x51', '0x62', '0x73']
    """
    pairs = high.astype(_PAIR)
    pairs <<= _PAIR.type(8)
    pairs |= low
    _exchange(pairs)
    return pairs.view(np.uint8).reshape(*low.shape[:-1], -1)


def apart(data: Bytes) -> tuple[Bytes, Bytes]:
    """The inverse of :func:`interleave`: uint8 [..., 2n] -> both sides, uint8 [..., n]."""
    pairs = np.ascontiguousarray(data).view(_PAIR).copy()
    _exchange(pairs)
    low = pairs.astype(np.uint8)
    pairs >>= _PAIR.type(8)
    return low, pairs.astype(np.uint8)


def _exchange(pairs: np.ndarray[Any, np.dtype[np.uint16]]) -> None:
    """The middle two of the four codes in each."""
    moved = pairs >> _PAIR.type(4)
    moved ^= pairs
    moved &= _PAIR.type(0x00F0)
    pairs ^= moved
    moved <<= _PAIR.type(4)
    pairs ^= moved
