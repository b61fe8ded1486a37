"""``x W^T`` of packed weights as one operator, for which ``kernels/`` has versions that never expand W in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nybble.core.errors import TokenError
from nybble.nn.operands import check_product, check_rows, record_of
from nybble.ops.loader import load_at_first_use
from nybble.qtensor import QTensor, from_spec
from nybble.qtensor._rows import gathered

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
        are accumulated in float32, so its result differs from the exact one by no more than this does. (A CPU's own
        products of bfloat16 count terms below float32's smallest normal number as zero.)
    """
    return functional.linear(x, qtensor_of(tensors, key).dequantize(x.dtype), bias)


def qtensor_of(tensors: Sequence[Tensor], key: str) -> QTensor:
    """The record over some tensors."""
    record = record_of(key)
    return from_spec(record["spec"], dict(zip(record["names"], tensors, strict=True)))


class Operator:
    """As ``torch.library.custom_op`` has it, in a third of its time a call, which counts where x has one row.

    Args:
        name: below ``nybble::``.
        reference: what it computes.
        takes: arguments of the reference, in the schema's language.
        fake: with these arguments, a tensor like the result.
        check: called with the name and these arguments, before kernels, reference and fake.
    """

    def __init__(self, name: str, reference: Kernel, takes: str, fake: Kernel, check: Callable[..., None]) -> None:
        self._init_fn, self._name, self._check = reference, name, check
        self._kernels: dict[str, Kernel] = {}
        self._say: dict[str, Says] = {}
        _LIBRARY.define(f"{name}({takes}) -> Tensor")
        torch.library.register_fake(f"nybble::{name}", self._checked(fake))
        _LIBRARY.impl(name, self._checked(reference), "CompositeExplicitAutograd")  # wherever there is no kernel
        self._op = getattr(torch.ops.nybble, name).default

    def _checked(self, run: Kernel) -> Kernel:
        def checked(*given: Any) -> Tensor:
            self._check(self._name, *given)
            return run(*given)

        return checked

    def register_kernel(self, device: str, says: Says | None = None) -> Callable[[Kernel], Kernel]:
        """Of a type of device; ``says`` answers for :meth:`how`."""

        def register(kernel: Kernel) -> Kernel:
            if device in _KEYS:
                if device not in self._kernels:
                    run = self._checked(lambda *given: self._kernels[device](*given))
                    _LIBRARY.impl(self._name, run, _KEYS[device])
                self._kernels[device] = kernel
                if says is not None:
                    self._say[device] = says
            return kernel

        return register

    def how(self, tensors: Sequence[Tensor], key: str, shape: Sequence[int], *more: Any) -> tuple[bool, str]:
        """Whether there is a kernel for a weight where its tensors are; its name, or why there is none."""
        device = tensors[0].device.type
        if device in self._kernels and device not in self._say:  # what waits for the first use is loaded by one
            self._load(tensors, key, shape, *more)
        if device not in self._say:
            return False, f"no kernels for {device}"
        return self._say[device](tensors, key, shape, *more)

    def _load(self, tensors: Sequence[Tensor], key: str, shape: Sequence[int], *more: Any) -> None:
        """A call of no rows, as products and rows of a table take them."""
        device = tensors[0].device
        if self is packed_rows:
            self(torch.zeros(0, dtype=torch.int64, device=device), list(tensors), key, list(shape), torch.float32)
        else:
            self(torch.zeros(0, shape[1], device=device), list(tensors), key, list(shape), None, *more)

    def __call__(self, *given: Any) -> Tensor:
        """With the arguments of the reference, in their order."""
        found: Tensor = self._op(*given)
        return found


def like_product(x: Tensor, tensors: Sequence[Tensor], key: str, shape: Sequence[int], *more: Any) -> Tensor:
    """Fake of a product."""
    return x.new_empty((*x.shape[:-1], shape[0]))


def rows_reference(
    ids: Tensor, tensors: Sequence[Tensor], key: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Some rows of a packed table.

    Args:
        ids: int64 or int32 [...], of rows.
        tensors: of a QTensor [rows, width], as :func:`reference` has them.
        key: as there.
        shape: as there.
        dtype: of what comes out.

    Returns:
        [..., width] in ``dtype``; a kernel's bits are the same.

    Raises:
        TokenError: a number that no row has (on a CPU; a GPU would have to be waited for).
    """
    check_ids(ids, shape[0])
    table = qtensor_of(tensors, key)
    some = gathered(table, ids.reshape(-1)) if ids.numel() else None
    if some is None:
        return functional.embedding(ids, table.dequantize(dtype))
    return some.dequantize(dtype).reshape(*ids.shape, shape[1])


def check_ids(ids: Tensor, rows: int) -> None:
    """Raise TokenError for numbers, on a CPU, of rows that a table doesn't have."""
    if ids.device.type != "cpu" or not ids.numel():
        return
    low, high = ids.aminmax()
    if low < 0 or high >= rows:
        raise TokenError(
            f"tokens from {int(low)} to {int(high)} for a table of {rows} rows; another model's tokenizer makes such."
        )


def _like_rows(ids: Tensor, tensors: Sequence[Tensor], key: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return ids.new_empty((*ids.shape, shape[1]), dtype=dtype)


WEIGHT = "Tensor[] tensors, str key, int[] shape"
packed_linear = Operator("packed_linear", reference, f"Tensor x, {WEIGHT}, Tensor? bias", like_product, check_product)
packed_rows = Operator("packed_rows", rows_reference, f"Tensor ids, {WEIGHT}, ScalarType dtype", _like_rows, check_rows)
load_at_first_use([packed_linear, packed_rows])
