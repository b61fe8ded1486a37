"""From the largest magnitude of a block to its scale; float32, the formulas that scale rules and fused ops share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nybble.core.errors import UsageError
from nybble.formats import NumberFormat

POW2_MODES = ("floor", "ceil", "even", "rceil")
_TINY = 2.0**-127


def divided(x: Tensor, number: float) -> Tensor:
    """``x / number``, correctly rounded on every device (given a Python number, CUDA multiplies by its reciprocal)."""
    return x / torch.full((), number, dtype=x.dtype, device=x.device)


def absmax_scale(amax: Tensor, target: float) -> Tensor:
    """``amax / target``; a zero block gets 1.

    Args:
        amax: float32, largest magnitude of each block.
        target: value of the format that it is mapped to.
    """
    scale = divided(amax, target)
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def pow2_scale(amax: Tensor, fmt: NumberFormat, mode: str) -> Tensor:
    """A power of two for each block (OCP MX v1.0, section 6.3, and the other rules in use).

    With emax the exponent of the format's largest binade:
    ``floor``  2^(floor(log2 amax) - emax): the specification's; a maximum whose mantissa exceeds the format's clips
    ``ceil``   2^(ceil(log2 amax) - emax)
    ``even``   as floor, of amax rounded to the format's mantissa bits (half up)
    ``rceil``  2^ceil(log2(amax / max)): never saturates

    The exponent is clamped to [-127, 127], E8M0's range; a zero block gets 2^-127, a NaN or Inf block NaN.

    Args:
        amax: float32, largest magnitude of each block.
        fmt: format of the elements.
        mode: one of the four.
    """
    if mode not in POW2_MODES:
        raise UsageError(f"pow2 mode {mode!r} is not one of {', '.join(POW2_MODES)}.")
    if mode == "rceil":
        # Exact: the quotient has 24 and 11 bits above and below the line, so in float64 none rounds to a power of two.
        mantissa, exponent = torch.frexp(divided(amax.double(), fmt.absmax))
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    else:
        mantissa, exponent = torch.frexp(amax)
        exponent = exponent - 1
        if mode == "even":  # half a unit of the format's last mantissa bit below 2 rounds up to the next power of two
            exponent = exponent + (mantissa >= 1 - 2.0 ** (-2 - getattr(fmt, "m", 0))).int()
        elif mode == "ceil":
            exponent = torch.where(mantissa == 0.5, exponent, exponent + 1)
        exponent = exponent - (math.frexp(fmt.absmax)[1] - 1)
    exponent = exponent.clamp(-127, 127)
    # By bits: exact on every device. 2^-127 is a subnormal.
    scale = torch.where(exponent > -127, (exponent + 127) << 23, 1 << 22).int().view(torch.float32)
    scale = torch.where(amax == 0, torch.full_like(scale, _TINY), scale)
    return torch.where(amax.isfinite(), scale, torch.full_like(scale, torch.nan))
