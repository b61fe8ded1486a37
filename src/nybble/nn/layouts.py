"""The QTensor layouts of a checkpoint: described once, named by number wherever a module has such a tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nybble.core.errors import FileError
from nybble.qtensor import QTensor, from_spec


class Layouts:
    """The distinct QTensor layouts of a checkpoint: spec, dtypes and shapes; modules name them by number."""

    def __init__(self, entries: list[dict[str, Any]] | None = None) -> None:
        self.entries: list[dict[str, Any]] = entries or []

    def number(self, qtensor: QTensor) -> int:
        """The number of this tensor's layout, added if it is new."""
        tensors = {n: [str(t.dtype).removeprefix("torch."), list(t.shape)] for n, t in qtensor.tensors().items()}
        return self.add({"spec": qtensor.spec(), "tensors": tensors})

    def add(self, entry: dict[str, Any]) -> int:
        """The number of an entry, appended if it is new."""
        if entry not in self.entries:
            self.entries.append(entry)
        return self.entries.index(entry)

    def empty(self, number: int) -> QTensor:
        """A QTensor of this layout on the current default device, its tensors to be filled."""
        entry = self.entries[number]
        tensors: dict[str, Tensor] = {}
        for name, (dtype, shape) in entry["tensors"].items():
            tensors[name] = torch.empty(shape, dtype=dtype_named(dtype))
        return from_spec(entry["spec"], tensors)


def dtype_named(name: object) -> torch.dtype:
    """The torch dtype of a name in a file.

    Raises:
        FileError: there is none.
    """
    kind = getattr(torch, str(name), None)
    if not isinstance(kind, torch.dtype):
        raise FileError(f"unknown dtype {name!r} in the description of a quantized tensor.")
    return kind
