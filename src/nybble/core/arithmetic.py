"""Arithmetic that must give the same bits on every device."""

from __future__ import annotations

import torch
from torch import Tensor


def divided(x: Tensor, number: float) -> Tensor:
    """``x / number``, correctly rounded on every device (given a Python number, CUDA multiplies by its reciprocal)."""
    return x / torch.full((), number, dtype=x.dtype, device=x.device)
