"""What this process has of the system's memory, giving it back, and looking for it no more often than it pays."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any


def resident_memory() -> int:
    """Bytes of memory that this process has now; 0 where the system doesn't say (other than Linux)."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), 0)


def trim_memory() -> None:
    """Return freed memory to the system now, where the C library can (glibc).

    It keeps what is freed between blocks of other sizes; over many layers such gaps add up to gigabytes.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


KEPT = 1 << 26
"""Bytes of freed memory that the C library may keep: giving back and taking again less isn't worth its time."""


class _Mallinfo2(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keep",
        )
    )


def trim_much() -> None:
    """As :func:`trim_memory`, where much is kept (glibc from 2.33 on says how much).

    After many small batches, whose tensors are all of their own sizes, that would be twice what is in use.
    """
    if _freed() > KEPT:
        trim_memory()


def _freed() -> int:
    """Bytes that are free and kept; 0 where the C library doesn't say."""
    ask = _asker()
    return 0 if ask is None else int(ask().fordblks)


@cache
def _asker() -> Any:
    ask = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if ask is not None:
        ask.restype = _Mallinfo2
    return ask


@contextmanager
def new_objects_alone() -> Iterator[None]:
    """Let Python's collector look through what is made inside, not again through all that was there before.

    torch and transformers make hundreds of thousands of objects that stay; to look through them takes a quarter of a
    second, as long as a small model's conversion. Where others have frozen objects already, nothing is changed.
    """
    ours = gc.get_freeze_count() == 0
    if ours:
        gc.freeze()
    try:
        yield
    finally:
        if ours:
            gc.unfreeze()
