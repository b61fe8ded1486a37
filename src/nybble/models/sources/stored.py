"""Tensors of safetensors files, in memory of their own.

Views of a mapped file keep its pages, and all that were read come to as much as the file; what is let go here is gone.
"""

from __future__ import annotations

from io import FileIO
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from nybble.core.errors import FileError
from nybble.core.files import disk_errors
from nybble.core.tensorheader import TensorEntry

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U32": torch.uint32,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""safetensors' names of the dtypes that models have."""


def empty_tensor(name: str, entry: TensorEntry) -> Tensor:
    """What :func:`read_tensor` gives, on the meta device.

    Raises:
        FileError: a dtype that no model has.
    """
    return torch.empty(entry.shape, dtype=_dtype(name, entry), device="meta")


def read_tensor(path: Path, start: int, name: str, entry: TensorEntry) -> Tensor:
    """A tensor of a file, of its dtype and shape.

    Args:
        path: the file.
        start: where its data begin.
        name: of the tensor, for messages.
        entry: of the header, whose offsets are checked.

    Raises:
        FileError: the file can't be read, or has become shorter; a dtype that no model has.
    """
    with disk_errors(path), path.open("rb", buffering=0) as file:
        return _read(file, path, start, name, entry)


class OpenFiles:
    """Reads as :func:`read_tensor` does and keeps files open in between, for many small tensors; a context manager."""

    def __init__(self) -> None:
        self._open: dict[Path, FileIO] = {}

    def read(self, path: Path, start: int, name: str, entry: TensorEntry) -> Tensor:
        """See :func:`read_tensor`."""
        with disk_errors(path):
            if path not in self._open:
                self._open[path] = path.open("rb", buffering=0)
            return _read(self._open[path], path, start, name, entry)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.close()


def _read(file: FileIO, path: Path, start: int, name: str, entry: TensorEntry) -> Tensor:
    dtype = _dtype(name, entry)
    data = torch.empty(entry.nbytes, dtype=torch.uint8)
    file.seek(start + entry.begin)
    room, count = data.numpy().data, 0
    while count < entry.nbytes:  # of a large tensor the system gives at most 2 GiB at once
        got = file.readinto(room[count:])
        if not got:
            raise FileError(f"{path}: became shorter while it was being read.")
        count += got
    return data.view(dtype).reshape(entry.shape)


def _dtype(name: str, entry: TensorEntry) -> torch.dtype:
    if entry.dtype not in DTYPES:
        raise FileError(f"{name} has dtype {entry.dtype}, which no model has.")
    return DTYPES[entry.dtype]
