"""Layer norm in integers: integer mean and variance, a square root by Newton's steps.

Source: I-BERT (arXiv:2101.01321), algorithm 4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nybble.core.errors import DataError

_BITS = 30
_WIDE = 2**20
"""Codes are below, so that sums of squares of up to 2^18 of them fit into 61 bits."""
_STEPS = 40


def integer_layer_norm(
    q: Tensor, scale: float, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last dimension.

    Each element is divided by the root: I-BERT's reciprocal, one a row, loses what is below its last bit.

    Args:
        q: codes, [..., n], magnitudes below 2^20.
        scale: of them.
        weight: [n], floats, none of them 0.
        bias: [n], floats.
        eps: as of the float layer.

    Returns:
        Codes, int64, and their scale, [n], float64.

    Raises:
        DataError: codes that are too wide, a scale that is too fine, or a weight of 0.
    """
    n = q.shape[-1]
    small = round(n * eps / scale**2)
    if bool((weight == 0).any()):
        raise DataError("a layer norm in integers needs weights other than 0: its scale is of them.")
    q = q.to(torch.int64)
    if int(q.abs().amax()) >= _WIDE or small >= 2**61 or n > 2**18:
        raise DataError(
            "what enters a layer norm in integers has codes below 2^20, a scale that is not too fine for eps, and at "
            "most 2^18 columns. Requantize first."
        )
    mean = torch.div(q.sum(-1, keepdim=True) * 2 + n, 2 * n, rounding_mode="floor")
    y = q - mean
    root = integer_sqrt((y * y).sum(-1, keepdim=True) + small).clamp(min=1)
    y = torch.div((y << _BITS) + (root >> 1), root, rounding_mode="floor")
    by = weight.double() * math.sqrt(n) / 2.0**_BITS
    return y + torch.round(bias.double() / by).to(torch.int64), by


def integer_sqrt(n: Tensor) -> Tensor:
    """Floor of the square root of integers in [0, 2^62), int64, by Newton's steps from above."""
    n = n.to(torch.int64)
    x = torch.full_like(n, 2**31)
    for _ in range(_STEPS):
        x = torch.minimum(x, (x + torch.div(n, x.clamp(min=1), rounding_mode="floor")) >> 1)
    return x
