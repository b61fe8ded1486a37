"""Reading a text file, with errors that say what to do."""

from __future__ import annotations

from pathlib import Path

from nybble.core.errors import DataError, FileError


def read_utf8(src: str) -> str:
    """Return a file's text, its line ends unchanged.

    Raises:
        FileError: not there, a folder, or not readable.
        DataError: not UTF-8; names the first bad byte.
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
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"data file {src!r} is not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start} (line {line})."
            " Convert it first, say with: iconv -t utf-8."
        ) from None
