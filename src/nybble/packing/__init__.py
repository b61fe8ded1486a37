"""Bit layouts of codes: one layout a file, dense in all of them.

A layout turns codes 0 .. 2**bits - 1 into bytes and back. ``dense`` is the default; ``base3`` stores five ternary
digits in a byte.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nybble.core.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

REGISTRY = Registry("nybble.packing", "packing layout", lambda part: isinstance(part, Layout))


@dataclass(frozen=True)
class Layout:
    """A bit layout.

    Attributes:
        name: key.
        pack: ``(codes [n], bits) -> uint8 [size(n, bits)]``.
        unpack: ``(bytes, bits, n) -> codes [n]``, the inverse.
        size: ``(n, bits) -> bytes``.
        holds: the only codes that survive, None for all below ``2**bits``.
    """

    name: str
    pack: Callable[[Tensor, int], Tensor]
    unpack: Callable[[Tensor, int, int], Tensor]
    size: Callable[[int, int], int]
    holds: frozenset[int] | None = None


def get_layout(name: str) -> Layout:
    """Layout by name: ``dense``, ``base3``."""
    layout: Layout = REGISTRY.get(name)
    return layout
