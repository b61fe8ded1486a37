"""A QTensor as a module: its tensors are saved, loaded and moved under their dotted names (``weight.codes``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.errors import FileError
from nybble.qtensor import QTensor, Spec, from_spec


class Packed(nn.Module):
    """Holds the tensors of one QTensor as buffers; nothing is quantized or learned here.

    The record over them is made once and kept until a buffer is replaced (moved, loaded, swapped by a functional call):
    a forward checks nothing and waits for no device. Shapes and dtypes are checked whenever the record is made, values
    by :func:`validate_packed`, which whoever fills the buffers from a file calls.

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
        self._view: tuple[QTensor, dict[str, Tensor]] | None = None

    def qtensor(self) -> QTensor:
        """The QTensor over the current buffers.

        Raises:
            FileError: a buffer was replaced by one of another shape or dtype.
        """
        buffers = {name: self.get_buffer(name) for name in self._names}
        if self._view is not None and all(buffers[name] is tensor for name, tensor in self._view[1].items()):
            return self._view[0]
        found = from_spec(self.spec, buffers)
        self._view = found, buffers
        return found

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
        self._forget()

        def move(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    def _forget(self) -> None:
        """Let go of what was made of the buffers, which are about to be replaced."""
        self._dense = self._view = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_view": None}  # a copy makes its own over its own buffers

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.spec.get('format', self.spec['kind'])}, {list(self.shape)}"


def validate_packed(root: nn.Module) -> None:
    """Check the values of all packed tensors that are there (not on the meta device); once, after loading.

    Raises:
        FileError: names the tensor and what is wrong with it.
    """
    for name, module in root.named_modules():
        if isinstance(module, Packed):
            try:
                found = module.qtensor()
                if all(tensor.device.type != "meta" for tensor in found.tensors().values()):
                    found.validate()
            except FileError as error:
                raise FileError(f"{name}: {error}") from error
