"""Matrix products of float32 tensors on the fast units of a processor, accumulated in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nybble.core.products import wide


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """Let float32 products round their factors, accumulating in float32: to bfloat16 on a CPU, to TF32 on a GPU.

    For sums whose terms are many and whose last digits decide nothing: a factor is off by 2^-9 (CPU) or 2^-11 at most,
    either way alike. Exact on a CPU when both factors came from bfloat16. 3-5 times as fast on processors with bf16
    instructions; where float32 is known to be the faster one (:mod:`nybble.core.products`), nothing is rounded. The
    setting before is restored.
    """
    if device.type == "cpu" and wide():
        yield
        return
    cpu = device.type == "cpu"
    backend: Any = torch.backends.mkldnn.matmul if cpu else torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = backend.fp32_precision
    backend.fp32_precision = "bf16" if cpu else "tf32"
    try:
        yield
    finally:
        backend.fp32_precision = before


def gram(x: Tensor) -> Tensor:
    """``x^T x`` accumulated in float32.

    Args:
        x: float32, bfloat16 or float16 [..., n, c].

    Returns:
        float32 [..., c, c].
    """
    if x.dtype == torch.float32:
        return x.mT @ x
    if x.device.type == "cuda" and x.dim() == 2:
        return torch.mm(x.T, x, out_dtype=torch.float32)
    wide = x.float()
    if x.dtype != torch.bfloat16:
        return wide.mT @ wide
    with fast_products(x.device):
        return wide.mT @ wide


def cross_gram(x: Tensor, y: Tensor, exact: bool) -> Tensor:
    """``x^T y`` accumulated in float32.

    Args:
        x: float32 [..., n, c].
        y: float32 [..., n, d].
        exact: keep all bits of the factors; else :func:`fast_products` may round them.

    Returns:
        float32 [..., c, d].
    """
    if exact:
        return x.mT @ y
    with fast_products(x.device):
        return x.mT @ y
