"""The header of a GGUF file, parsed with every claim checked against the file's size.

The gguf package's reader trusts the file: it allocates what a header claims and fails with whatever numpy raises.
This parser reads the same layout, refuses what can't be true, and leaves the tensors' bytes where they are.

    magic "GGUF" | version u32 | tensors u64 | pairs u64
    pairs x  (key: string, type: u32, value)                     string = length u64 + UTF-8
    tensors x (name: string, n_dims u32, dims u64 x n, type u32, offset u64)
    padding to ``general.alignment``, then the data; offsets count from there

Source: github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from nybble.core.errors import FileError
from nybble.core.guard import reading
from nybble.models.gguf.types import by_number

# GGUF value type -> numpy dtype; 8 is a string, 9 an array.
SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
STRING, ARRAY = 8, 9
SMALLEST_PAIR, SMALLEST_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8
MAX_DIMS = 4


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """Where a tensor is.

    ``shape``: outermost dimension first (GGUF stores it reversed). ``kind``: ggml's number of the type. ``start``: from
    the beginning of the file.
    """

    shape: tuple[int, ...]
    kind: int
    start: int
    nbytes: int


@cache
def sizes() -> Mapping[int, tuple[int, int]]:
    """Type -> elements and bytes of a block: what the installed gguf package knows, and the types of nybble's own."""
    ours = {number: (kind.block, kind.nbytes) for number, kind in by_number().items()}
    from gguf.constants import GGML_QUANT_SIZES  # here: quantizing what is no GGUF file needs no gguf

    return ours | {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """Metadata and tensors of a GGUF file, both in the file's order."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


class _Cursor:
    """Reads forward through the file and never past its end."""

    def __init__(self, data: mmap.mmap, place: Path) -> None:
        self.data = data
        self.place = place
        self.at = 0

    def take(self, count: int, what: str) -> int:
        """Step over ``count`` bytes; return where they begin."""
        if count > len(self.data) - self.at:
            raise FileError(
                f"{self.place}: {what} at byte {self.at} claims {count} bytes; the file has {len(self.data)}."
            )
        start, self.at = self.at, self.at + count
        return start

    def number(self, layout: str, what: str) -> int:
        """One little-endian integer."""
        return int(struct.unpack_from(layout, self.data, self.take(struct.calcsize(layout), what))[0])

    def count(self, smallest: int, what: str) -> int:
        """A u64 count of items of at least ``smallest`` bytes each, which must fit in what is left."""
        count = self.number("<Q", what)
        if count * smallest > len(self.data) - self.at:
            raise FileError(f"{self.place}: claims {count} {what}; the file has {len(self.data)} bytes.")
        return count

    def string(self, what: str) -> str:
        """Length and UTF-8."""
        length = self.number("<Q", what)
        start = self.take(length, what)
        return self.data[start : start + length].decode("utf-8")


def _value(cursor: _Cursor, kind: int, key: str) -> Any:
    if kind == STRING:
        return cursor.string(key)
    if kind in SCALARS:
        return _scalars(cursor, kind, 1, key)[0]
    if kind != ARRAY:
        raise FileError(f"{cursor.place}: {key} has value type {kind}, which GGUF does not define.")
    item = cursor.number("<I", key)
    if item == STRING:
        return [cursor.string(key) for _ in range(cursor.count(8, f"strings in {key}"))]
    if item not in SCALARS:
        raise FileError(f"{cursor.place}: {key} is an array of type {item}; numbers or strings are known.")
    return _scalars(cursor, item, cursor.count(np.dtype(SCALARS[item]).itemsize, f"numbers in {key}"), key)


def _scalars(cursor: _Cursor, kind: int, count: int, key: str) -> list[Any]:
    dtype = np.dtype(SCALARS[kind])
    start = cursor.take(dtype.itemsize * count, key)
    return np.frombuffer(cursor.data, dtype, count, start).tolist()  # type: ignore[no-any-return]


def _tensor(cursor: _Cursor, name: str) -> GgufTensor:
    """One tensor's entry; ``start`` still counts from the data section."""
    dims = cursor.number("<I", name)
    if not 1 <= dims <= MAX_DIMS:
        raise FileError(f"{cursor.place}: {name} has {dims} dimensions; GGUF allows 1 to {MAX_DIMS}.")
    shape = tuple(cursor.number("<Q", name) for _ in range(dims))[::-1]
    kind = cursor.number("<I", name)
    if kind not in sizes():
        raise FileError(f"{cursor.place}: {name} has tensor type {kind}, unknown to the installed gguf package.")
    block, block_bytes = sizes()[kind]
    if min(shape) < 1 or shape[-1] % block:
        raise FileError(f"{cursor.place}: {name} has shape {list(shape)}; rows of type {kind} are blocks of {block}.")
    nbytes = math.prod(shape) // block * block_bytes
    start = cursor.number("<Q", name)
    return GgufTensor(shape=shape, kind=kind, start=start, nbytes=nbytes)


def _parse(cursor: _Cursor) -> GgufHeader:
    if cursor.data[cursor.take(4, "the magic") : 4] != b"GGUF":
        raise FileError(f"{cursor.place} doesn't begin with 'GGUF'.")
    version = cursor.number("<I", "the version")
    if version not in (2, 3):
        raise FileError(f"{cursor.place} is GGUF version {version} (little-endian); 2 and 3 are known.")
    tensor_count = cursor.count(SMALLEST_TENSOR, "tensors")
    pair_count = cursor.count(SMALLEST_PAIR, "metadata pairs")
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = cursor.string("a key")
        if key in metadata:
            raise FileError(f"{cursor.place}: {key!r} occurs twice.")
        metadata[key] = _value(cursor, cursor.number("<I", key), key)
    entries: dict[str, GgufTensor] = {}
    for _ in range(tensor_count):
        name = cursor.string("a tensor name")
        if name in entries:
            raise FileError(f"{cursor.place}: tensor {name!r} occurs twice.")
        entries[name] = _tensor(cursor, name)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise FileError(f"{cursor.place}: general.alignment is {alignment!r}; a power of two is needed.")
    data_start = -(-cursor.at // alignment) * alignment
    return GgufHeader(metadata=metadata, tensors=_placed(cursor, entries, data_start, alignment))


def _placed(cursor: _Cursor, entries: dict[str, GgufTensor], data_start: int, alignment: int) -> dict[str, GgufTensor]:
    """Tensors with absolute positions, each inside the file."""
    placed: dict[str, GgufTensor] = {}
    for name, entry in entries.items():
        start = data_start + entry.start
        if entry.start % alignment or start + entry.nbytes > len(cursor.data):
            raise FileError(
                f"{cursor.place}: {name} claims bytes {start} to {start + entry.nbytes} (aligned to {alignment}); "
                f"the file has {len(cursor.data)}. Truncated?"
            )
        placed[name] = GgufTensor(shape=entry.shape, kind=entry.kind, start=start, nbytes=entry.nbytes)
    return placed


def read_gguf_header(path: Path) -> GgufHeader:
    """Parse and check the header of ``path``.

    Raises:
        FileError: missing, not GGUF version 2 or 3, truncated, or with claims that the file's size contradicts.
    """
    if not path.is_file():
        raise FileError(f"{path} is missing.")
    if not path.stat().st_size:
        raise FileError(f"{path} is empty.")
    with reading(path), path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _parse(_Cursor(data, path))
