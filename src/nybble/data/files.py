"""Reading a text file, packed or not, with errors that say what to do."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path

from nybble.core.errors import DataError, FileError

PACKED: dict[str, tuple[bytes, Callable[[bytes], bytes]]] = {
    ".gz": (b"\x1f\x8b", gzip.decompress),
    ".bz2": (b"BZh", bz2.decompress),
    ".xz": (b"\xfd7zXZ\x00", lzma.decompress),
}
"""Ending -> how such a file begins, and what unpacks it."""
NO_TEXT = {
    b"PK\x03\x04": "an archive or an office document", b"PAR1": "a Parquet file", b"%PDF": "a PDF",
    b"\x28\xb5\x2f\xfd": "packed by zstd", b"ARROW1": "an Arrow file", b"SQLite format 3": "a data base",
}  # fmt: skip
"""How files begin that hold text in a form that isn't read here."""


def ending(src: str) -> str:
    """What a file's name says of its form, in lower case and without how it is packed.

    >>> ending("data/Rows.JSONL.gz")
    '.jsonl'
    """
    path = Path(src)
    while path.suffix.lower() in PACKED:
        path = path.with_suffix("")
    return path.suffix.lower()


def read_utf8(src: str) -> str:
    """Return a file's text, its line ends unchanged; what gzip, bzip2 or xz packed is unpacked.

    Raises:
        FileError: not there, a folder, not readable, or packed and damaged.
        DataError: not text, which is said, or not UTF-8; names the first bad byte.
    """
    path = Path(src).expanduser()
    if path.is_dir():
        raise FileError(f"data {src!r} is a folder. Give one text or JSONL file in it.")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise FileError(f"data file {src!r} does not exist. Give a path that does, or 'builtin'.") from None
    except OSError as error:
        raise FileError(f"data file {src!r} can't be read: {error.strerror or error}.") from error
    content = _unpacked(content, src)
    for begins, what in NO_TEXT.items():
        if content.startswith(begins):
            raise DataError(f"data file {src!r} is {what}. Give its text in a text or JSONL file.")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"data file {src!r} is not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start} (line {line})."
            " Convert it first, say with: iconv -t utf-8."
        ) from None


def _unpacked(content: bytes, src: str) -> bytes:
    for begins, unpack in PACKED.values():
        if content.startswith(begins):
            try:
                return unpack(content)
            except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
                raise FileError(f"data file {src!r} can't be unpacked: {error}.") from error
    return content
