"""The edge where other people's parsers meet files that may be broken or hostile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from nybble.core.errors import FileError, NybbleError


@contextmanager
def reading(what: object, error: type[NybbleError] = FileError) -> Iterator[None]:
    """Turn whatever a parser raises on bad input into one NybbleError that names ``what`` was being read.

    Rust extensions (safetensors, tokenizers) report a panic as a BaseException, so ``except Exception`` is too narrow;
    interrupts pass through untouched.
    """
    try:
        yield
    except (NybbleError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as cause:
        text = " ".join(str(cause).split())[:300]
        raise error(f"{what} can't be read: {type(cause).__name__}: {text}") from cause
