"""Softmax of integers with a shift a row: a table of 256 entries for 2^-f, a shift for whole powers, one division."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nybble.nn.integer.shifts import shift_right

BITS = 16
"""Of exponentials and of probabilities: codes of 1 are 2^16."""
_FRACTION, _FACTOR, _FARTHEST = 8, 20, 31


EXP2 = tuple(round(2**BITS * 2 ** (-f / 2**_FRACTION)) for f in range(2**_FRACTION))
"""``2^(-f/256)`` in 16 bits."""


def block_softmax(q: Tensor, shifts: Tensor, scaling: float, seen: Tensor | None) -> Tensor:
    """``softmax(scaling q 2^-t)`` over the last dimension, of what is seen.

    What isn't seen takes no part in the row's shift and maximum, and its probability is 0 exactly.

    Args:
        q: integers [..., m, n], magnitudes below 2^31, int64 or held in float64.
        shifts: of them, of its shape.
        scaling: positive.
        seen: bool, of a shape that meets ``q``'s; None is all.

    Returns:
        Probabilities times 2^16, from 0 to 2^16, as ``q``; a row that sees nothing is 0.
    """
    mask = torch.ones_like(q, dtype=torch.bool) if seen is None else seen.expand(q.shape)
    common = torch.where(mask & (q != 0), shifts, 127).amin(-1, keepdim=True)
    aligned = shift_right(q, torch.where(mask, shifts - common, 0))
    lowest = -(2**40)
    below = torch.where(mask, aligned, lowest).amax(-1, keepdim=True) - aligned
    factor = round(scaling * math.log2(math.e) * 2**_FACTOR)
    by = (common + (_FACTOR - _FRACTION)).clamp(min=-8)
    power = shift_right(torch.where(mask, below, 0) * factor, by)
    power = power.clamp(max=2**_FRACTION * (_FARTHEST + 1) - 1)
    whole, rest = _split(power)
    value = torch.where(mask, shift_right(_table(q)[rest], whole), 0)
    total = value.sum(-1, keepdim=True)
    return _divided(value, total.clamp(min=1))


def _table(q: Tensor) -> Tensor:
    return torch.tensor(EXP2, dtype=q.dtype, device=q.device)


def _split(power: Tensor) -> tuple[Tensor, Tensor]:
    """Whole powers and the fraction's index, int64."""
    if power.is_floating_point():
        whole = torch.floor(power / 2**_FRACTION)
        return whole.long(), (power - whole * 2**_FRACTION).long()
    return power >> _FRACTION, power & (2**_FRACTION - 1)


def _divided(value: Tensor, total: Tensor) -> Tensor:
    """``round(2^16 value / total)``, half up."""
    if value.is_floating_point():
        return torch.floor((value * 2**BITS + torch.floor(total / 2)) / total)
    return torch.div((value << BITS) + (total >> 1), total, rounding_mode="floor")
