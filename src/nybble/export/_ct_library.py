"""compressed-tensors itself, which judges what was written; nothing is written with it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from nybble.core.versions import at_least

NEEDS = ("compressed-tensors", "transformers")
OLDEST = (0, 20)
"""Those before it pack integers of 3, 5, 6 and 7 bits otherwise."""


@contextmanager
def quietly() -> Iterator[None]:
    """Without the warnings of other libraries, at import and after."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@cache
def library() -> Any:
    """The module ``compressed_tensors``.

    Raises:
        UsageError: it is missing or too old.
    """
    at_least(
        "compressed-tensors",
        OLDEST,
        needs="--check of this target needs the package compressed-tensors",
        install=f"pip install 'compressed-tensors>={OLDEST[0]}.{OLDEST[1]}'",
        why="its packed integers differ",
    )
    with quietly():
        import compressed_tensors
        import compressed_tensors.compressors
        import compressed_tensors.quantization
    return compressed_tensors
