"""Devices that aren't there, or run full, as nybble's own errors."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from nybble.core.errors import DeviceError, UsageError

if TYPE_CHECKING:
    import torch


def check_device(device: torch.device | str) -> str:
    """The device's name, ``cpu``, or ``cuda`` (``cuda:1``) that is there.

    Raises:
        UsageError: neither. DeviceError: no such CUDA device.
    """
    name = str(device)
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or not (number.isdecimal() or name == kind):
        raise UsageError(f"device {name!r} is neither cpu nor cuda.")
    if kind == "cpu":
        return name
    import torch  # takes seconds, which a word that names no device needn't wait for

    if not torch.cuda.is_available():
        raise DeviceError("no CUDA device is available (torch.cuda.is_available() is false); use --device cpu.")
    if int(number or 0) >= torch.cuda.device_count():
        raise DeviceError(f"there is no {name}; CUDA devices: {torch.cuda.device_count()}.")
    return name


@contextmanager
def out_of_memory(device: str) -> Iterator[None]:
    """Turn torch's error of a full device into one that says what to change."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            f"{device} ran out of memory. Use a smaller --batch, fewer or shorter samples, or --spill."
        ) from error


def require_memory(needed: int, device: torch.device, fitting: Callable[[int], str] | None = None) -> None:
    """Refuse a run that can't fit; names both numbers.

    Args:
        needed: bytes.
        device: where.
        fitting: says what would fit into so many bytes; None: what makes any run smaller.
    """
    import torch

    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    if needed > free:
        usual = "Use fewer samples or shorter ones (--samples, --seq-len), a smaller --batch, or --spill."
        raise DeviceError(
            f"about {needed / 1e9:.1f} GB are needed on {device} and {free / 1e9:.1f} GB are free. "
            f"{usual if fitting is None else fitting(free)}"
        )


def available_memory() -> int:
    """Bytes of memory that can be had without swapping."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text(encoding="ascii").splitlines() if meminfo.exists() else []
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@cache
def measure_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-adds x 2 a second of a square product, from a few milliseconds of it, measured once a process."""
    import torch

    n = 1024 if device.type == "cpu" else 4096
    a = torch.ones(n, n, dtype=dtype, device=device)
    best = math.inf
    for _ in range(3):
        _wait(device)
        start = time.perf_counter()
        a @ a
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
