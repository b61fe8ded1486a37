"""Matrix products in float32 whose factors are exactly bfloat16: the fast units multiply them without losing a bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def bf16_products() -> Iterator[None]:
    """Let float32 products on the CPU round their factors to bfloat16 (accumulating in float32); restored afterwards.

    Exact when both factors came from bfloat16, and 3-5 times as fast on processors with bf16 instructions.
    """
    backend: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # made at import time
    before = backend.fp32_precision
    backend.fp32_precision = "bf16"
    try:
        yield
    finally:
        backend.fp32_precision = before


def gram(x: Tensor) -> Tensor:
    """``x^T x`` accumulated in float32.

    Args:
        x: float32, bfloat16 or float16 [n, c].

    Returns:
        float32 [c, c].
    """
    if x.dtype == torch.float32:
        return x.T @ x
    if x.device.type == "cuda":
        return torch.mm(x.T, x, out_dtype=torch.float32)
    wide = x.float()
    if x.dtype != torch.bfloat16:
        return wide.T @ wide
    with bf16_products():
        return wide.T @ wide
