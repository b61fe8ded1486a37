"""From the largest magnitude of a block to its scale; float32, the formulas that scale rules and fused ops share."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from nybble.core.arithmetic import POW2_MODES as POW2_MODES
from nybble.core.arithmetic import divided as divided
from nybble.core.errors import UsageError
from nybble.core.shapes import Float32
from nybble.formats import NumberFormat


def absmax_scale(amax: Float32[Tensor, "*shape"], fmt: NumberFormat, target: float) -> Float32[Tensor, "*shape"]:
    """``amax / target``, :func:`guarded`.

    Args:
        amax: float32, largest magnitude of each block.
        fmt: format of the elements.
        target: value of the format that it is mapped to.
    """
    return guarded(divided(amax, target), fmt)


def guarded(scale: Float32[Tensor, "*shape"], fmt: NumberFormat) -> Float32[Tensor, "*shape"]:
    """The scale that a block is stored with: 1 for 0, but 0 where ``fmt`` has no zero that could stand for the block.

    Args:
        scale: float32, 0 for a block of zeros.
        fmt: format of the elements.
    """
    return torch.where(scale == 0, torch.ones_like(scale), scale) if fmt.has_zero else scale


def pow2_scale(amax: Float32[Tensor, "*shape"], fmt: NumberFormat, mode: str) -> Float32[Tensor, "*shape"]:
    """A power of two for each block (OCP MX v1.0, section 6.3, and the other rules in use).

    With emax the exponent of the format's largest binade:
    ``floor``  2^(floor(log2 amax) - emax): the specification's; a maximum whose mantissa exceeds the format's clips
    ``ceil``   2^(ceil(log2 amax) - emax)
    ``even``   as floor, of amax rounded to the format's mantissa bits (half up)
    ``rceil``  2^ceil(log2(amax / max)): never saturates
    ``rfloor``  2^floor(log2(amax / max)): at most the scale amax / max, where ``floor`` may be above it
    ``nearest``  2^round(log2(amax / max))

    The exponent is clamped to [-127, 127], E8M0's range; a zero block gets 2^-127 (0 in a format without a zero, as
    :func:`guarded` has it), a NaN or Inf block NaN.

    Args:
        amax: float32, largest magnitude of each block.
        fmt: format of the elements.
        mode: one of the six.
    """
    if mode not in POW2_MODES:
        raise UsageError(f"pow2 mode {mode!r} is not one of {', '.join(POW2_MODES)}.")
    emax = math.frexp(fmt.absmax)[1] - 1  # absmax = top * 2^emax, 1 <= top < 2
    finite = amax.isfinite()
    least = torch.full_like(amax, emax, dtype=torch.int32)
    if emax < 1:  # where amax is subnormal its bits don't tell its exponent; a format above 1 clamps there anyhow
        amax, least = torch.where(amax < 1, amax * 2.0 ** (1 - emax), amax), torch.where(amax < 1, 1, least)
    carry = pow2_carry(fmt, mode)
    biased = ((amax.view(torch.int32) + carry >> 23) - least).clamp(0, 254)
    scale = (biased << 23).clamp(min=1 << 22).view(torch.float32)  # 2^-127 is a subnormal: half of 2^-126's bits
    if not fmt.has_zero:
        scale = torch.where(amax == 0, torch.zeros_like(scale), scale)
    return torch.where(finite, scale, torch.full_like(scale, torch.nan))


def pow2_carry(fmt: NumberFormat, mode: str) -> int:
    """What is added to the bits of a float32 magnitude, so that its exponent goes up where ``mode`` rounds up."""
    top = 2 * math.frexp(fmt.absmax)[0]
    below = 1 << 23
    middle = math.frexp(top * math.sqrt(2))  # of a binade, in units of max: at this mantissa "nearest" goes up
    return {
        "floor": 0,
        "ceil": below - 1,
        "even": below >> getattr(fmt, "m", 0) + 1,
        "rceil": below - 1 - int(np.float32(top - 1) * below),
        "rfloor": -math.ceil(np.float32(top - 1) * below),  # below max's mantissa it borrows from the exponent
        "nearest": below - math.ceil((2 * middle[0] - 1) * below) - (middle[1] - 1) * below,
    }[mode]
