"""How a bfloat16 parameter is written after a step: to the nearest, stochastically, or with eight more bits beside it.

A bfloat16 has 8 bits of significand, so a step below 2**-9 of a weight is lost when it is rounded to the nearest.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from nybble.core.errors import UsageError

Weights = Literal["nearest", "stochastic", "residual8"]
WEIGHTS: tuple[str, ...] = get_args(Weights)
_LARGEST = 0x7F7F  # of bfloat16's finite numbers, as an integer


def check_weights(weights: object) -> None:
    """Raise UsageError for an unknown word."""
    if weights not in WEIGHTS:
        raise UsageError(f"weights={weights!r}: how bfloat16 parameters are rounded is one of {', '.join(WEIGHTS)}.")


def check_fits(weights: str, dtype: torch.dtype) -> None:
    """Raise UsageError for a word that a parameter's dtype can't have."""
    if weights != "nearest" and dtype == torch.float16:
        raise UsageError(
            f"weights={weights} is for bfloat16 parameters, and this one is torch.float16; use bfloat16, or "
            "weights=nearest."
        )


def split24(x: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 in 24 bits: a bfloat16 that is usable by itself, and what it lacks.

    The 16-bit significand nearest to ``x`` (ties to even) is kept whole. As integers, with the sign apart, it is 256
    times the bfloat16's bits plus the residual: the bfloat16 is the nearest one, ties away from zero.

    Args:
        x: float32, any shape.

    Returns:
        bfloat16 and int8, both of the shape of ``x``; Inf and NaN have a residual of 0.
    """
    bits = x.contiguous().view(torch.int32)
    sign, magnitude = bits & -0x80000000, bits & 0x7FFFFFFF
    whole = (magnitude + 0x7F + (magnitude >> 8 & 1)) >> 8
    whole = whole.clamp(max=(_LARGEST << 8) + 0x7F)  # what is finite stays so
    high = (whole + 0x80) >> 8
    finite = magnitude < 0x7F800000
    weight = torch.where(finite, (sign | high << 16).view(torch.float32), x)
    return weight.to(torch.bfloat16), torch.where(finite, whole - (high << 8), 0).to(torch.int8)


def join24(weight: Tensor, residual: Tensor) -> Tensor:
    """The inverse of :func:`split24`, exact: float32."""
    x = weight.float().contiguous()
    bits = x.view(torch.int32)
    joined = (bits & -0x80000000) | ((bits & 0x7FFFFFFF) + (residual.int() << 8)).clamp(0, 0x7F7FFFFF)
    return torch.where(x.isfinite(), joined.view(torch.float32), x)


def random_bits(x: Tensor, generator: torch.Generator) -> Tensor:
    """What :func:`stochastic_bfloat16` adds below the bits that stay: int32 of the shape of ``x``, 0 .. 2**16 - 1."""
    return torch.randint(0, 1 << 16, x.shape, generator=generator, dtype=torch.int32, device=x.device)


def stochastic_bfloat16(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 to one of the two neighbouring bfloat16 numbers, up with the share of the way there; exact ones stay."""
    bits = x.contiguous().view(torch.int32)
    moved = ((bits + random_bits(x, generator)) & -0x10000).view(torch.float32)
    return torch.where(x.isfinite(), moved, x).to(torch.bfloat16)
