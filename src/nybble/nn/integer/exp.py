"""e^x for x <= 0 in integers: ``x = -z ln 2 + p``, a parabola for e^p, a shift by z.

Source: I-BERT (Kim et al. 2021, arXiv:2101.01321), algorithm 3, with the released code's coefficients.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nybble.core.errors import DataError

SQUARE, LINEAR, CONSTANT = 0.35815147, 0.96963238, 1.0
"""``e^p`` on (-ln 2, 0]: off by 1.9e-3 at most."""
MOST_SHIFT = 30
"""e^x below 2^-30 is that."""


def integer_exp(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """``e^(S q)``.

    Args:
        q: codes, none above 0.
        scale: of them, between 2^-15 and ln 2.

    Returns:
        Codes, int64, in [0, 2^31), and their scale; those of 1 are in [2^30, 2^31).

    Raises:
        DataError: a scale that is too coarse or too fine for integers of 64 bits.
    """
    if not 2.0**-15 <= scale <= math.log(2):
        raise DataError(f"scales of an integer exponential are from 2^-15 to ln 2; got {scale:g}. Requantize first.")
    step = math.floor(math.log(2) / scale)
    slope, one = math.floor(LINEAR / SQUARE / scale), math.floor(CONSTANT / SQUARE / scale**2)
    q = q.to(torch.int64).clamp(min=-MOST_SHIFT * step)
    z = torch.div(-q, step, rounding_mode="floor")
    p = q + z * step
    drop = one.bit_length() - 1  # so that 1 gets 31 bits
    value = ((p * (p + slope) + one) << MOST_SHIFT) >> z >> drop
    return value, SQUARE * scale**2 / 2.0 ** (MOST_SHIFT - drop)
