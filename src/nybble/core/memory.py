"""Giving memory back to the system."""

from __future__ import annotations

import ctypes


def trim_memory() -> None:
    """Return freed memory to the system now, where the C library can (glibc).

    It keeps what is freed between blocks of other sizes; over many layers such gaps add up to gigabytes.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
