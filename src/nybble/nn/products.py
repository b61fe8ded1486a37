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

DEVICES = frozenset({"cpu"})
"""Types of devices for which there are kernels."""
Kernel = Callable[[Tensor, Sequence[Tensor], str, Sequence[int], Tensor | None], Tensor]

_LIBRARY = torch.library.Library("nybble", "FRAGMENT")
_LIBRARY.define("packed_linear(Tensor x, Tensor[] tensors, str key, int[] shape, Tensor? bias) -> Tensor")


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


class _Op:
    """As ``torch.library.custom_op`` has it, with a third of its time a call: of a layer's product at one row, a tenth."""

    def __init__(self) -> None:
        self._init_fn = reference
        self._kernels: dict[str, Kernel] = {}

    def register_kernel(self, device: str) -> Callable[[Kernel], Kernel]:
        """Of a type of device."""

        def register(kernel: Kernel) -> Kernel:
            if device not in self._kernels:
                key = {"cpu": "CPU", "cuda": "CUDA"}[device]
                _LIBRARY.impl("packed_linear", lambda *given: self._kernels[device](*given), key)
            self._kernels[device] = kernel
            return kernel

        return register

    def __call__(self, *given: Any) -> Tensor:
        found: Tensor = torch.ops.nybble.packed_linear.default(*given)
        return found


@torch.library.register_fake("nybble::packed_linear")
def _(x: Tensor, tensors: Sequence[Tensor], key: str, shape: Sequence[int], bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], shape[0]))


packed_linear = _Op()
load_at_first_use([packed_linear])
