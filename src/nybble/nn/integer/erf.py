"""erf in integers: a parabola up to 1.769, then 1. Source: I-BERT (arXiv:2101.01321), algorithm 2."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nybble.core.errors import DataError

SQUARE, TOP = 0.2888, 1.769
"""``erf(x) = sign(x) (1 - 0.2888 (min(|x|, 1.769) - 1.769)^2)``: off by 0.096 beside 0, where it jumps."""
BITS = 16
"""Codes of 1 have no more."""


def integer_erf(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """``erf(S q)``.

    Args:
        q: codes.
        scale: of them, from 2^-24 to 1.769.

    Returns:
        Codes, int64, of magnitudes below 2^16, and their scale.

    Raises:
        DataError: a scale that is too coarse or too fine.
    """
    if not 2.0**-24 <= scale <= TOP:
        raise DataError(f"scales of an integer erf are from 2^-24 to {TOP}; got {scale:g}. Requantize first.")
    top, one = math.floor(TOP / scale), math.floor(1 / (SQUARE * scale**2))
    shift = max(0, one.bit_length() - BITS)
    q = q.to(torch.int64)
    below = q.abs().clamp(max=top) - top
    return torch.sign(q) * ((one - below * below) >> shift), SQUARE * scale**2 * 2.0**shift
