"""Softmax in integers: the largest is subtracted, exponentials are divided by their sum.

Source: I-BERT (arXiv:2101.01321), section 3.5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.nn.integer.exp import integer_exp


def integer_softmax(q: Tensor, scale: float, dim: int = -1, bits: int = 8) -> tuple[Tensor, float]:
    """``softmax(S q)`` along a dimension.

    Args:
        q: codes, up to 2^31 along ``dim``.
        scale: as of :func:`nybble.nn.integer.exp.integer_exp`.
        dim: the dimension.
        bits: of the probabilities.

    Returns:
        Unsigned codes, int64, in [0, 2^bits - 1] (1 is the largest), and their scale, 2^-bits.
    """
    value, _ = integer_exp(q - q.amax(dim, keepdim=True), scale)
    total = value.sum(dim, keepdim=True)
    codes = torch.div((value << bits) + (total >> 1), total, rounding_mode="floor")
    return codes.clamp(max=2**bits - 1), 2.0**-bits
