"""A QTensor as a module: its tensors are saved, loaded and moved under their dotted names (``weight.codes``)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from nybble.core.errors import FileError
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.compiled import dequantize, key_of
from nybble.nn.float_products import holds_floats
from nybble.nn.integer_products import holds_integers
from nybble.nn.products import DEVICES, Operator, packed_linear, packed_rows
from nybble.nn.rotation import BlockRotation
from nybble.qtensor import QTensor, Spec, from_spec


class _Part(nn.Module):
    """The tensors below one name of a QTensor; a call gives them, by names relative to this.

    They are only ever read by calls, so that what brings a module's tensors for its calls alone (accelerate's hooks,
    where weights are offloaded) has brought them.
    """

    def forward(self) -> dict[str, Tensor]:
        return _tensors(self)


def _tensors(part: nn.Module) -> dict[str, Tensor]:
    found = {name: tensor for name, tensor in part._buffers.items() if tensor is not None}
    for name, inner in part._modules.items():
        if inner is not None:
            found |= {f"{name}.{key}": tensor for key, tensor in inner().items()}
    return found


class Packed(nn.Module):
    """Holds the tensors of one QTensor as buffers and gives its values; nothing is quantized or learned here.

    The record over them is made once and kept until a buffer is replaced (moved, loaded, swapped by a functional call):
    a forward checks nothing and waits for no device. Shapes and dtypes are checked whenever the record is made, values
    by :func:`validate_packed`, which whoever fills the buffers from a file calls.

    Args:
        qtensor: what to hold; on the meta device when a checkpoint will fill it.
        dtype: of the float weight that it stands for, which models ask for and ``.to(dtype)`` changes; None: of none.

    Attributes:
        whole: whether the values are integers of up to 8 bits times scales.
        few: whether they are what tensor cores read, times scales (:mod:`nybble.nn.float_products`).
    """

    def __init__(self, qtensor: QTensor, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.spec: Spec = qtensor.spec()
        self.shape, self.dtype = torch.Size(qtensor.shape), dtype
        for name, tensor in qtensor.tensors().items():
            *path, leaf = name.split(".")
            part: nn.Module = self
            for inner in path:
                if inner not in part._modules:
                    part.add_module(inner, _Part())
                part = cast("nn.Module", part._modules[inner])
            part.register_buffer(leaf, tensor)
        self.whole, self.few = holds_integers(self.spec), holds_floats(self.spec)
        self._key = key_of(self.spec, list(_tensors(self)))
        self._dense: Tensor | None = None
        self._view: tuple[QTensor, dict[str, Tensor]] | None = None

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(itertools.chain(self.buffers(), self.parameters())).device

    def qtensor(self) -> QTensor:
        """The QTensor over the current buffers.

        Raises:
            FileError: a buffer was replaced by one of another shape or dtype.
        """
        buffers = _tensors(self)
        if self._view is not None and all(buffers[name] is tensor for name, tensor in self._view[1].items()):
            return self._view[0]
        found = from_spec(self.spec, buffers)
        if not hasattr(self, "_hf_hook"):  # accelerate's: it lets go of the tensors after the call, and so must we
            self._view = found, buffers
        return found

    def forward(self, dtype: torch.dtype) -> Tensor:
        """The values in ``dtype``; the held copy if :meth:`hold` made one."""
        if self._dense is not None and self._dense.dtype == dtype:
            return self._dense
        if torch.compiler.is_compiling():
            values: Tensor = dequantize(list(_tensors(self).values()), self._key, list(self.shape), dtype)
            return values
        return self.qtensor().dequantize(dtype)

    @property
    def holds(self) -> bool:
        """Whether :meth:`hold` keeps the values."""
        return self._dense is not None

    def held(self, dtype: torch.dtype) -> bool:
        """Whether :meth:`hold` keeps the values in ``dtype``."""
        return self._dense is not None and self._dense.dtype == dtype

    @property
    def brought(self) -> bool:
        """Whether the values are a call's alone: accelerate's hooks bring the tensors, or a subclass learns them."""
        return hasattr(self, "_hf_hook") or type(self).forward is not Packed.forward

    def arguments(self) -> tuple[list[Tensor], str, torch.Size]:
        """Tensors, key and shape, as operators take them."""
        return list(_tensors(self).values()), self._key, self.shape

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x W^T + bias``; see :func:`nybble.nn.products.reference`."""
        y: Tensor = packed_linear(x, list(_tensors(self).values()), self._key, self.shape, _as(x, bias))
        return y

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Some rows in ``dtype``: int64 [...] -> [..., width]; see :func:`nybble.nn.products.rows_reference`."""
        if self.held(dtype) or self.brought or ids.device != self.device or ids.device.type not in DEVICES:
            return functional.embedding(ids, self(dtype).to(ids.device))
        found: Tensor = packed_rows(ids, list(_tensors(self).values()), self._key, self.shape, dtype)
        return found

    def rounded_linear(self, op: Operator, x: Tensor, bias: Tensor | None, inputs: ActivationQuantizer) -> Tensor:
        """``inputs(x) W^T + bias`` by an operator; see :func:`nybble.nn.integer_products.reference`."""
        weight = list(_tensors(self).values())
        y: Tensor = op(x, weight, self._key, self.shape, _as(x, bias), *inputs.arguments())
        return y

    def how(self, op: Operator = packed_linear, inputs: ActivationQuantizer | None = None) -> tuple[bool, str]:
        """Whether there is a kernel where this is; its name, or why there is none.

        Args:
            op: of :meth:`linear`, or of :meth:`rounded_linear`.
            inputs: as there.
        """
        weight = list(_tensors(self).values())
        return op.how(weight, self._key, self.shape, *(() if inputs is None else inputs.arguments()))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """A call, by name."""
        values: Tensor = self(dtype)
        return values

    def hold(self, dtype: torch.dtype | None) -> None:
        """Keep the dequantized values (speed for memory), or with None let go of them; no number changes."""
        self._dense = None if dtype is None else self.qtensor().dequantize(dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Packed:
        # .to(dtype) must not touch scales: they are float32 by contract. Only moves between devices pass.
        self._forget()
        if self.dtype is not None:
            self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype

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


def _as(x: Tensor, bias: Tensor | None) -> Tensor | None:
    """The bias in the dtype of x, which autocast may have changed."""
    return bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)


def validate_packed(root: nn.Module) -> None:
    """Check the values of all packed tensors, and rotations, that are there (not on the meta device); after loading.

    Raises:
        FileError: names the tensor and what is wrong with it.
    """
    for name, module in root.named_modules():
        if isinstance(module, Packed | BlockRotation):
            try:
                found = module.qtensor() if isinstance(module, Packed) else module
                tensors = found.buffers() if isinstance(found, BlockRotation) else found.tensors().values()
                if all(tensor.device.type != "meta" for tensor in tensors):
                    found.validate()
            except FileError as error:
                raise FileError(f"{name}: {error}") from error


def offer_offloading(root: nn.Module) -> None:
    """Show packed tensors as parameters while a model is loaded and spread over devices.

    accelerate plans with parameters, and offloads buffers only where the caller asks it to.
    """
    for part in _parts(root):
        for name, tensor in list(part._buffers.items()):
            if tensor is not None:
                del part._buffers[name]
                part.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


def end_offer(root: nn.Module) -> None:
    """Show them as buffers again, so that nothing trains or casts them; accelerate goes on to offload the same ones."""
    for part in _parts(root):
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                del part._parameters[name]
                part.register_buffer(name, parameter.detach())
        hook = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if getattr(one, "offload", False):
                one.offload_buffers = True  # type: ignore[union-attr]


def _parts(root: nn.Module) -> Iterator[nn.Module]:
    """The modules that hold the tensors of QTensors."""
    for module in root.modules():
        if isinstance(module, Packed):
            yield from module.modules()
