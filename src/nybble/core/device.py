"""Devices that aren't there, or run full, as nybble's own errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nybble.core.errors import DeviceError, UsageError


def check_device(device: str) -> None:
    """Raise unless ``device`` is ``cpu``, or ``cuda`` (``cuda:1``) and there.

    Raises:
        UsageError: neither. DeviceError: no such CUDA device.
    """
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or not (number.isdecimal() or device == kind):
        raise UsageError(f"device {device!r} is neither cpu nor cuda.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise DeviceError("no CUDA device is available (torch.cuda.is_available() is false); use --device cpu.")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise DeviceError(f"there is no {device}; CUDA devices: {torch.cuda.device_count()}.")


@contextmanager
def out_of_memory(device: str) -> Iterator[None]:
    """Turn torch's error of a full device into one that says what to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            f"{device} ran out of memory. Use a smaller --batch, fewer or shorter samples, or --spill."
        ) from error
