"""Types whose codes name vectors of a code book, read as the scalars that these are made of.

Eight (or four) neighbours share an index and their signs, so the file has fewer bits than codes of one value each;
values and scales are the same. The code books themselves are in the package gguf, whose dequantizer, given blocks with
an outer scale of 1, says what the vectors are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from nybble.formats import get_format
from nybble.models.gguf.types import BlockType, Bytes, Parts

Numbers = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Book:
    """All bytes of a block of such a type.

    Attributes:
        name: ggml's. nbytes: of a block. values: of the codes, ascending. scales: of the scales' codes.
        codes_of: bytes -> codes of the scales, [blocks, n].
        outer: bytes -> (the outer scale as bytes of float16, the same blocks with an outer scale of 1).
    """

    name: str
    nbytes: int
    values: tuple[float, ...]
    scales: tuple[float, ...]
    codes_of: Callable[[Bytes], Numbers]
    outer: Callable[[Bytes], tuple[Bytes, Bytes]]

    @cached_property
    def _grid(self) -> Numbers:
        return np.array(self.values, np.float32)

    def read(self, data: Bytes) -> Parts:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        outer, blocks = self.outer(np.ascontiguousarray(data))
        codes = self.codes_of(np.ascontiguousarray(data)).astype(np.uint8)
        scale = np.array(self.scales, np.float32)[codes]
        values = dequantize(blocks, GGMLQuantizationType[self.name]).reshape(*codes.shape, -1) / scale[..., None]
        found = np.searchsorted(self._grid, values).astype(np.uint8)
        return {"codes": found.reshape(len(data), -1), "scale": codes, "d": outer}


def signed(*sizes: float) -> tuple[float, ...]:
    """Both signs of each, ascending."""
    return tuple(sorted([*sizes, *(-size for size in sizes)]))


def steps(first: float, step: float, count: int) -> tuple[float, ...]:
    """Evenly spaced."""
    return tuple(first + step * i for i in range(count))


def nibbles(start: int) -> Callable[[Bytes], Numbers]:
    """Scales in the halves of the last bytes, low ones first."""
    return lambda data: np.stack([data[:, start:] & 15, data[:, start:] >> 4], -1).reshape(len(data), -1)


def top_bits(start: int, stride: int, dtype: str, shift: int, mask: int) -> Callable[[Bytes], Numbers]:
    """Scales in the top bits of words, one in every ``stride`` of them."""
    return lambda data: (np.ascontiguousarray(data[:, start:]).view(dtype)[:, stride - 1 :: stride] >> shift) & mask


def at_first(data: Bytes) -> tuple[Bytes, Bytes]:
    """The outer scale stands in front."""
    blocks = data.copy()
    blocks[:, :2] = np.array([0x00, 0x3C], np.uint8)  # 1 in float16
    return np.ascontiguousarray(data[:, :2]), blocks


def book_type(number: int, group: int, book: Book) -> BlockType:
    """The record of a type that is only read."""
    count = 256 // group
    names = [get_format(f"table[{','.join(map(str, values))}]").name for values in (book.values, book.scales)]
    line = f"{names[0]} group={group} scale_format=({names[1]} group={count} scale_format=float16)"
    return BlockType(number=number, block=256, line=line, fields=(book,))


TERNARY: Sequence[float] = (-1.125, -1.0 + 0.125, -0.125, 0.125, 1.0 - 0.125, 1.125)
"""-1, 0 and 1, an eighth up or down."""
