"""What this process has of the system's memory, and giving it back."""

from __future__ import annotations

import ctypes
from pathlib import Path


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
