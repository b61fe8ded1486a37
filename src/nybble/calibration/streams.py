"""What flows between two blocks for all calibration samples: named tensors, in memory or in mapped files."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nybble.calibration.arguments import Held, own
from nybble.calibration.trace import HIDDEN, BlockCall, Tensors
from nybble.core.files import disk_errors, need_space


class Stream:
    """The tensors in front of the next block, batch by batch, and how its stack's blocks are called.

    One path through the model: what the float network computes, or the network with its blocks so far quantized. Blocks
    read and overwrite. Tensors whose first dimension is the batch's samples lie in one piece of memory, or one file,
    each.

    Args:
        samples: in all. device: where blocks run.
        spill: leading part of the names of files to map instead of using memory; the system pages them in and out.
            They are removed by :meth:`close`.
    """

    def __init__(self, samples: int, device: torch.device, spill: Path | None = None) -> None:
        self.samples, self.device, self._spill = samples, device, spill
        self.calls: dict[int, Sequence[BlockCall]] = {}
        self._sizes: dict[int, int] = {}
        self._held: dict[int, Held] = {}
        self._whole: dict[str, _Rows] = {}
        self._loose: dict[int, dict[str, Tensor]] = {}

    def begin(self, start: int, calls: Sequence[BlockCall], given: Tensors, size: int | None = None) -> None:
        """Take the batch that starts at sample ``start``: its calls, and what its first block is given.

        ``size``: its samples, where the hidden states' first dimension may be another. Arguments that batches of one
        size have in common are held once.
        """
        self._sizes[start] = len(given[HIDDEN]) if size is None else size
        self.calls[start] = self._held.setdefault(self._sizes[start], Held()).shared(calls)
        self.write(start, given)

    def fork(self, spill: Path | None = None) -> Stream:
        """A copy that goes its own way from here."""
        twin = Stream(self.samples, self.device, spill)
        twin.calls, twin._sizes = {start: own(calls) for start, calls in self.calls.items()}, dict(self._sizes)
        for start in self.calls:
            twin.write(start, self.read(start))
        return twin

    def __iter__(self) -> Iterator[int]:
        """The batches, by their first sample."""
        return iter(self.calls)

    def read(self, start: int) -> dict[str, Tensor]:
        """A batch's tensors on the device."""
        stop = start + self._sizes[start]
        found = {name: rows.read(start, stop, self.device) for name, rows in self._whole.items()}
        return found | self._loose.get(start, {})

    def write(self, start: int, tensors: Tensors) -> None:
        """Overwrite a batch's tensors."""
        for name, tensor in tensors.items():
            if tensor.dim() and len(tensor) == self._sizes[start] and self._fits(name, tensor):
                self._whole[name].write(start, tensor)
            else:
                self._loose.setdefault(start, {})[name] = tensor

    def _fits(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor goes into the one piece of its name, which its first batch makes."""
        if name not in self._whole:
            path = None if self._spill is None else self._spill.with_name(f"{self._spill.name}.{name}")
            self._whole[name] = _Rows((self.samples, *tensor.shape[1:]), tensor.dtype, self.device, path)
        return self._whole[name].takes(tensor)

    def finite(self) -> bool:
        """Whether no value is NaN or Inf."""
        loose = (tensor for tensors in self._loose.values() for tensor in tensors.values())
        return all(rows.finite() for rows in self._whole.values()) and all(
            bool(torch.isfinite(tensor).all()) for tensor in loose
        )

    def close(self) -> None:
        """Let go of memory and files."""
        for rows in self._whole.values():
            rows.close()
        self._whole, self._loose, self.calls, self._held = {}, {}, {}, {}


class _Rows:
    """One tensor [samples, ...] in memory or in a mapped file."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, spill: Path | None) -> None:
        self._spill = spill
        if spill is None:
            self._data = torch.empty(shape, dtype=dtype, device=device)
        else:
            _reserve(spill, math.prod(shape) * dtype.itemsize)
            flat = torch.from_file(str(spill), shared=True, size=math.prod(shape), dtype=dtype)
            self._data = flat.view(shape)

    def takes(self, value: Tensor) -> bool:
        return value.shape[1:] == self._data.shape[1:] and value.dtype == self._data.dtype

    def read(self, start: int, stop: int, device: torch.device) -> Tensor:
        return self._data[start:stop].to(device)

    def write(self, start: int, value: Tensor) -> None:
        self._data[start : start + value.shape[0]].copy_(value)

    def finite(self) -> bool:
        return all(bool(torch.isfinite(sample).all()) for sample in self._data)

    def close(self) -> None:
        self._data = torch.empty(0)
        if self._spill is not None:
            self._spill.unlink(missing_ok=True)


def _reserve(path: Path, size: int) -> None:
    """Make a file of this size whose blocks exist: writing through a map to a full disk would kill the process."""
    need_space(path, size)
    with disk_errors(path, size), path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)


Streams = Mapping[str, Stream]
"""By path: ``float``, ``quantized``."""
