"""Products of 16-bit floats on a processor that multiplies float32 faster: computed there, rounded back.

A CPU with AMX or AVX512-BF16 multiplies bfloat16 2 to 5 times as fast as float32; one without at half the speed. Which
it is, a measurement says. Nothing else changes: tensors keep their dtype, sums are accumulated in float32 either way,
and a gradient flows through the casts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

ROWS = 32
"""A product of fewer rows costs less than the casts of what they are multiplied with."""

_HALF = (torch.bfloat16, torch.float16)
_REPEATS = 30
_CLEARLY = 0.8
"""Of the time in 16 bits: what float32 must stay below to be chosen, so that a measurement's noise decides nothing."""

_PRODUCTS = frozenset((
    functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm,
    torch.addmm, torch.baddbmm, torch.einsum, functional.conv1d, functional.conv2d,
    functional.scaled_dot_product_attention,
))  # fmt: skip
_wide: ContextVar[bool] = ContextVar("_wide", default=False)


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What products of ``dtype`` are best computed in on ``device``: float32 where that is clearly faster, or itself.

    Measured once a process, in a few milliseconds, with one thread.
    """
    if device.type != "cpu" or dtype not in _HALF:
        return dtype
    return torch.float32 if _float32_is_faster(dtype) else dtype


@contextmanager
def products_in(dtype: torch.dtype) -> Iterator[None]:
    """Compute products of 16-bit floats on the CPU in float32, if ``dtype`` is that; otherwise as they are."""
    wide = dtype == torch.float32
    before = _wide.set(wide)
    try:
        if wide:
            with _WideProducts():
                yield
        else:
            yield
    finally:
        _wide.reset(before)


def wide() -> bool:
    """Whether products are computed in float32 now, so that bfloat16 would not make them faster."""
    return _wide.get()


class _WideProducts(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() > 1]  # no bias
            first = next((x for x in given if x.dtype in _HALF), None)
            if first is not None and first.device.type == "cpu" and first.numel() >= ROWS * first.shape[-1]:
                found: Tensor = func(*map(_float, args), **{key: _float(value) for key, value in kwargs.items()})
                return found.to(first.dtype)
        return func(*args, **kwargs)


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _HALF else value


@cache
def _float32_is_faster(dtype: torch.dtype) -> bool:
    ones = {mode: torch.ones(256, 256, dtype=mode) for mode in (dtype, torch.float32)}
    best = dict.fromkeys(ones, math.inf)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a millisecond of one thread is seldom interrupted, on a busy machine too
    try:
        for repeat in range(_REPEATS):
            for mode, x in ones.items():
                start = time.perf_counter()
                functional.linear(x, x)
                spent = time.perf_counter() - start
                best[mode] = min(best[mode], spent) if repeat else math.inf  # the first call sets the library up
    finally:
        torch.set_num_threads(threads)
    return best[torch.float32] < _CLEARLY * best[dtype]
