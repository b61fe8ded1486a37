"""Multiplication by powers of two with rounding: all that a scale of 2^-t asks for.

Integers are shifted; integers held in float64, the simulation, are multiplied. Both round half up.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MOST = 62
"""A shift further right leaves nothing of any int64 that is added to half a unit."""


def shift_right(q: Tensor, by: Tensor) -> Tensor:
    """``floor(q / 2^by + 1/2)``; to the left where ``by`` is negative.

    Args:
        q: integers, magnitudes below 2^61 (and below 2^63 once shifted to the left), in int64 or held in float64.
        by: integers, of a shape that meets ``q``'s.

    Returns:
        As ``q``: int64 or float64.
    """
    if q.is_floating_point():
        return torch.floor(q * power_of_two(-by) + 0.5)
    q, by = q.to(torch.int64), by.to(torch.int64)
    right, left = by.clamp(0, _MOST), (-by).clamp(0, _MOST)
    half = (torch.ones_like(right) << right) >> 1
    return ((q << left) + half) >> right


def bit_length(m: Tensor) -> Tensor:
    """int64: ``floor(log2 m) + 1``, and 0 of 0, without a logarithm.

    Args:
        m: integers from 0 to 2^62, in int64 or held in float64.
    """
    if m.is_floating_point():
        return torch.frexp(m).exponent.to(torch.int64)
    powers = torch.ones(_MOST + 1, dtype=torch.int64, device=m.device) << torch.arange(_MOST + 1, device=m.device)
    return torch.bucketize(m.to(torch.int64), powers, right=True)


def power_of_two(e: Tensor) -> Tensor:
    """``2^e`` of integers from -1022 to 1023, float64, by its bits: ``pow`` need not be exact."""
    return ((e.to(torch.int64) + 1023) << 52).view(torch.float64)
