"""A distrustful reader of safetensors headers: a malformed file gives a FileError and nothing else.

Layout: 8 bytes little-endian length of the header; the header, a JSON object ``{name: {dtype, shape,
data_offsets}}`` with an optional ``__metadata__`` of strings, padded with spaces; then the tensors, row-major and
without gaps. Offsets count from the end of the header.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nybble.core.errors import FileError
from nybble.core.files import disk_errors

DTYPE_BITS = {
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8"), 8),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Bits of one element by safetensors dtype name."""

_HEADER_LIMIT = 100_000_000  # bytes; the safetensors package's own limit


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One tensor of a file.

    Attributes:
        dtype: safetensors name, ``BF16``.
        shape: sizes; empty for a scalar.
        begin: first byte, counted from the end of the header.
        nbytes: size in bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class TensorHeader:
    """What a safetensors file says it holds, checked against its size.

    Attributes:
        path: the file.
        tensors: entries by name, in the order of their bytes.
        metadata: the file's own strings.
        data_start: bytes before the first tensor: the length field and the header.
    """

    path: Path
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    data_start: int


def read_tensor_header(path: Path | str) -> TensorHeader:
    """Read and check a safetensors header; no tensor is read.

    Raises:
        FileError: the file can't be read, is truncated or too long, or its header is malformed in any way.
    """
    path = Path(path)
    try:
        with disk_errors(path), path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > size - 8:
                raise _MalformedError(f"it ends before its header does ({size:,} bytes); is the download complete?")
            if length > _HEADER_LIMIT:
                raise _MalformedError(f"its header of {length:,} bytes is over the limit of {_HEADER_LIMIT:,}")
            text = file.read(length)
        tensors, metadata = _parse(text, size - 8 - length)
    except _MalformedError as error:
        raise FileError(f"{path}: not a valid safetensors file: {error}.") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested too deeply, a path with a zero byte
        raise FileError(f"{path}: not a valid safetensors file: its header can't be read ({error}).") from error
    return TensorHeader(path=path, tensors=tensors, metadata=metadata, data_start=8 + length)


def data_start(path: Path | str) -> int:
    """Where the data of a file begin whose header was read before.

    Raises:
        FileError: it can't be read.
    """
    path = Path(path)
    with disk_errors(path), path.open("rb", buffering=0) as file:
        return 8 + int.from_bytes(file.read(8), "little")


class _MalformedError(Exception):
    """What is wrong with a header; becomes a FileError that names the file."""


def _parse(text: bytes, data_bytes: int) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    header = json.loads(text.decode(), object_pairs_hook=_unique)
    if not isinstance(header, dict):
        raise _MalformedError("its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _MalformedError("__metadata__ is not an object of strings")
    entries = {name: _entry(name, value) for name, value in header.items()}
    # An empty tensor begins where its neighbour does: the end decides which comes first.
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].begin + item[1].nbytes, item[0])))
    position = 0
    for name, entry in ordered.items():
        if entry.begin != position:
            what = "overlaps the tensor before it" if entry.begin < position else "leaves a gap before it"
            raise _MalformedError(f"tensor {_short(name)} {what} (byte {entry.begin:,}; {position:,} expected)")
        position += entry.nbytes
    if position != data_bytes:
        raise _MalformedError(f"its tensors take {position:,} bytes, and {data_bytes:,} follow the header")
    return ordered, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _MalformedError("a name occurs twice in its header")
    for name in found:
        name.encode()  # a lone surrogate can't be written or printed: UnicodeEncodeError, a ValueError
    return found


def _entry(name: str, value: Any) -> TensorEntry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise _MalformedError(f"tensor {_short(name)} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _MalformedError(f"tensor {_short(name)} has dtype {_short(str(dtype))}; known: {', '.join(DTYPE_BITS)}")
    if not _sizes(shape) or len(shape) > 64:
        raise _MalformedError(f"tensor {_short(name)} has a shape that is not a list of at most 64 sizes")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _MalformedError(f"tensor {_short(name)} has data_offsets that are not [begin, end]")
    bits = DTYPE_BITS[dtype]
    for size in shape:
        bits *= size
    begin, end = offsets
    if bits != 8 * (end - begin):
        raise _MalformedError(
            f"tensor {_short(name)}, {dtype} of shape {shape}, does not fill its {end - begin:,} bytes exactly"
        )
    return TensorEntry(dtype=dtype, shape=tuple(shape), begin=begin, nbytes=end - begin)


def _short(name: str) -> str:
    return repr(name if len(name) <= 100 else name[:100] + "…")


def _sizes(value: Any) -> bool:
    # bool is an int in Python; 2**63 is where offsets stop fitting other readers.
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)
