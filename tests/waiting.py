"""Refuses whatever would make a GPU's processor wait, so that a step can be recorded as a CUDA graph."""

from __future__ import annotations

from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

#: Operators whose result, or its shape, the processor reads; and ``torch.tensor(...)``, which copies from it.
WAIT = frozenset((
    "aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero", "aten::masked_select",
    "aten::equal", "aten::allclose", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
    "aten::bincount", "aten::histc", "aten::repeat_interleave.Tensor", "aten::lift_fresh",
))  # fmt: skip
INDEX = frozenset(("aten::index", "aten::index_put", "aten::index_put_"))


class WaitError(Exception):
    """An operator that waits for the device."""


class NeverWaits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises :class:`WaitError` at the first operator that would wait; our own operators run as they do on a GPU.

    Args:
        warm: let everything pass, so that tables are built that stay (the engine's first steps aren't recorded either).
    """

    def __init__(self, *, warm: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.warm = warm

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if not self.warm:
            masked = name in INDEX and any(at is not None and at.dtype in (torch.bool, torch.uint8) for at in args[1])
            if masked or name in WAIT or func.name() in WAIT:
                raise WaitError(f"{func.name()} waits for the device, and can't be recorded")
        if func.namespace == "nybble":  # the reference, not the processor's own kernel
            with self:
                return OPDEFS[name]._init_fn(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))
