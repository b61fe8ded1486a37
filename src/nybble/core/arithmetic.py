"""Arithmetic that must give the same bits on every device."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


POW2_MODES = ("floor", "ceil", "even", "rceil", "rfloor", "nearest")
"""Rules by which a number becomes a power of two (:func:`nybble.ops.scaling.pow2_scale`)."""


def divided(x: Tensor, number: float) -> Tensor:
    """``x / number``, correctly rounded on every device (given a Python number, CUDA multiplies by its reciprocal)."""
    import torch

    return x / torch.full((), number, dtype=x.dtype, device=x.device)
