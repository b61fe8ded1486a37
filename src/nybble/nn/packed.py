"""A QTensor as a module: its tensors are saved, loaded and moved under their dotted names (``weight.codes``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nybble.qtensor import QTensor, Spec, from_spec


class Packed(nn.Module):
    """Holds the tensors of one QTensor as buffers; nothing is quantized or learned here.

    Args:
        qtensor: what to hold; on the meta device when a checkpoint will fill it.
    """

    def __init__(self, qtensor: QTensor) -> None:
        super().__init__()
        self.spec: Spec = qtensor.spec()
        self.shape = torch.Size(qtensor.shape)
        self._names = tuple(qtensor.tensors())
        for name, tensor in qtensor.tensors().items():
            *path, leaf = name.split(".")
            holder: nn.Module = self
            for part in path:
                if part not in holder._modules:
                    holder.add_module(part, nn.Module())
                holder = holder.get_submodule(part)
            holder.register_buffer(leaf, tensor)
        self._dense: Tensor | None = None

    def qtensor(self) -> QTensor:
        """The QTensor over the current buffers."""
        return from_spec(self.spec, {name: self.get_buffer(name) for name in self._names})

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The values in ``dtype``; the held copy if :meth:`hold` made one."""
        if self._dense is not None and self._dense.dtype == dtype:
            return self._dense
        return self.qtensor().dequantize(dtype)

    def hold(self, dtype: torch.dtype | None) -> None:
        """Keep the dequantized values (speed for memory), or with None let go of them; no number changes."""
        self._dense = None if dtype is None else self.qtensor().dequantize(dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Packed:
        # .to(dtype) must not touch scales: they are float32 by contract. Only moves between devices pass.
        self._dense = None

        def move(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.spec.get('format', self.spec['kind'])}, {list(self.shape)}"
