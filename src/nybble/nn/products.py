"""``x W^T`` of packed weights as one operator, for which ``kernels/`` has versions that never expand W in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nybble.ops.loader import load_at_first_use
from nybble.qtensor import QTensor, from_spec

DEVICES = frozenset({"cpu", "cuda"})
"""Types of devices for which there are kernels."""
Kernel = Callable[..., Tensor]
"""With the arguments of an operator's reference."""
Says = Callable[..., tuple[bool, str]]
"""(tensors, key, shape, and what else the operator has) -> whether a kernel fits; its name, or why none does."""

_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
_LIBRARY: Any = torch.library.Library("nybble", "FRAGMENT")  # type: ignore[no-untyped-call]


def reference(x: Tensor, tensors: Sequence[Tensor], key: str, shape: Sequence[int], bias: Tensor | None) -> Tensor:
    """W in the dtype of x, and a product of torch's.

    Args:
        x: float32, bfloat16 or float16 [..., in].
        tensors: of a QTensor [out, in], in the order that ``key`` has.
        key: of :func:`nybble.nn.compiled.key_of`.
        shape: of the QTensor.
        bias: [out], of the dtype of x, or None.

    Returns:
        [..., out] of the dtype of x. A kernel's W is the same in float32, and not rounded to the dtype of x; its sums
        are accumulated in float32, so its result differs from the exact one by no more than this does.
    """
    return functional.linear(x, qtensor_of(tensors, key).dequantize(x.dtype), bias)


def qtensor_of(tensors: Sequence[Tensor], key: str) -> QTensor:
    """The record over some tensors."""
    record = _record(key)
    return from_spec(record["spec"], dict(zip(record["names"], tensors, strict=True)))


@cache
def _record(key: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(key)
    return found


class Operator:
    """As ``torch.library.custom_op`` has it, in a third of its time a call, which counts where x has one row.

    Args:
        name: below ``nybble::``.
        reference: ``(x, tensors, key, shape, bias, ...) -> Tensor``, the first as :func:`reference` has them.
        more: what follows these in the schema.
    """

    def __init__(self, name: str, reference: Kernel, more: str = "") -> None:
        self._init_fn, self._name = reference, name
        _LIBRARY.define(f"{name}(Tensor x, Tensor[] tensors, str key, int[] shape, Tensor? bias{more}) -> Tensor")
        torch.library.register_fake(f"nybble::{name}", _fake)
        self._op = getattr(torch.ops.nybble, name).default
        self._kernels: dict[str, Kernel] = {}
        self._say: dict[str, Says] = {}

    def register_kernel(self, device: str, says: Says | None = None) -> Callable[[Kernel], Kernel]:
        """Of a type of device; ``says`` answers for :meth:`how`."""

        def register(kernel: Kernel) -> Kernel:
            if device in _KEYS:
                if device not in self._kernels:
                    _LIBRARY.impl(self._name, lambda *given: self._kernels[device](*given), _KEYS[device])
                self._kernels[device] = kernel
                if says is not None:
                    self._say[device] = says
            return kernel

        return register

    def how(self, tensors: Sequence[Tensor], key: str, shape: Sequence[int], *more: Any) -> tuple[bool, str]:
        """Whether there is a kernel for a weight where its tensors are; its name, or why there is none."""
        device = tensors[0].device.type
        if device in self._kernels and device not in self._say:  # what waits for the first use is loaded by one
            self(torch.zeros(0, shape[1], device=device), list(tensors), key, list(shape), None, *more)
        if device not in self._say:
            return False, f"no kernels for {device}"
        return self._say[device](tensors, key, shape, *more)

    def __call__(self, *given: Any) -> Tensor:
        """With the arguments of the reference, in their order."""
        found: Tensor = self._op(*given)
        return found


def _fake(x: Tensor, tensors: Sequence[Tensor], key: str, shape: Sequence[int], *more: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], shape[0]))


packed_linear = Operator("packed_linear", reference)
load_at_first_use([packed_linear])
