"""Hidden states of all calibration samples between two blocks, in memory or in a file that is mapped."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from torch import Tensor

from nybble.core.files import disk_errors, need_space


class Activations:
    """A tensor [samples, tokens, width] that blocks read and overwrite batch by batch.

    Args:
        shape: [samples, tokens, width]. dtype: of the model's hidden states. device: where blocks run.
        spill: a file to map instead of using memory; the system pages it in and out. It is removed by :meth:`close`.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, spill: Path | None = None
    ) -> None:
        self.device, self._spill = device, spill
        if spill is None:
            self._data = torch.empty(shape, dtype=dtype, device=device)
        else:
            _reserve(spill, math.prod(shape) * dtype.itemsize)
            flat = torch.from_file(str(spill), shared=True, size=math.prod(shape), dtype=dtype)
            self._data = flat.view(shape)

    def __len__(self) -> int:
        return self._data.shape[0]

    def read(self, start: int, stop: int) -> Tensor:
        """Samples ``start .. stop`` on the device."""
        return self._data[start:stop].to(self.device)

    def write(self, start: int, value: Tensor) -> None:
        """Overwrite the samples from ``start`` on."""
        self._data[start : start + value.shape[0]].copy_(value)

    def finite(self) -> bool:
        """Whether no value is NaN or Inf."""
        return all(bool(torch.isfinite(sample).all()) for sample in self._data)

    def close(self) -> None:
        """Let go of the memory and the file."""
        self._data = torch.empty(0)
        if self._spill is not None:
            self._spill.unlink(missing_ok=True)


def _reserve(path: Path, size: int) -> None:
    """Make a file of this size whose blocks exist: writing through a map to a full disk would kill the process."""
    need_space(path, size)
    with disk_errors(path, size), path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
