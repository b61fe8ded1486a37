"""Sigmoid in integers: ``e / (1 + e)`` of ``e = exp(-|x|)``, mirrored; Swish is x times it. Source: Q-ASR's method."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nybble.nn.integer.exp import integer_exp


def integer_sigmoid(q: Tensor, scale: float, bits: int = 8) -> tuple[Tensor, float]:
    """``1 / (1 + exp(-S q))``.

    Args:
        q: codes.
        scale: as of :func:`nybble.nn.integer.exp.integer_exp`.
        bits: of the result.

    Returns:
        Unsigned codes, int64, in [0, 2^bits - 1] (1 is the largest), and their scale, 2^-bits.
    """
    e, fine = integer_exp(-q.to(torch.int64).abs(), scale)
    total = e + math.floor(1 / fine)
    small = torch.div((e << bits) + (total >> 1), total, rounding_mode="floor")
    return torch.where(q > 0, 2**bits - small, small).clamp(max=2**bits - 1), 2.0**-bits


def integer_swish(q: Tensor, scale: float, bits: int = 8) -> tuple[Tensor, float]:
    """``x sigmoid(x)``; arguments as of :func:`integer_sigmoid`, codes as wide as ``q`` and ``bits`` together."""
    gate, fine = integer_sigmoid(q, scale, bits)
    return q.to(torch.int64) * gate, scale * fine
