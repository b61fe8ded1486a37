"""Matrix products of blocks: sums of a strip in int32, shifted to the coarsest scale of their row and added.

Source: BCT (arXiv:2304.01483). Bounds are of :func:`check_columns`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nybble.core.errors import SchemeError
from nybble.nn.integer.blocks import Blocks
from nybble.nn.integer.shifts import shift_right

BIAS_BITS = 30
"""Signed: a bias takes at most a quarter of the accumulator."""


def product(x: Blocks, y: Blocks, bias: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """``x @ y^T + bias`` as integers, not narrowed yet.

    A strip's sum of products has the shift ``t_x + t_y``. All strips' are shifted, with rounding, to the smallest of
    these shifts, and added; the bias is one more summand.

    Args:
        x: [..., m, k].
        y: [..., n, k].
        bias: codes [n] and their shifts [n], int64.

    Returns:
        Sums [..., m, n], int64 (their magnitudes fit 32 bits) or float64, and their shifts [..., m, n], int64.
    """
    strip = math.gcd(x.strip, y.strip)
    x, y = x.cut(strip), y.cut(strip)
    pieces = list(enumerate(zip(torch.split(x.codes, strip, -1), torch.split(y.codes, strip, -1), strict=True)))
    least = _shifts(x, y, 0)
    for k, _ in pieces[1:]:
        least = torch.minimum(least, _shifts(x, y, k))
    if bias is not None:
        least = torch.minimum(least, bias[1])
    total = torch.zeros_like(least, dtype=x.wide().dtype)
    for k, (a, b) in pieces:
        total = total + shift_right(_sums(a, b), _shifts(x, y, k) - least)
    if bias is not None:
        total = total + shift_right(bias[0].to(total.dtype), bias[1] - least)
    return total, least


def _shifts(x: Blocks, y: Blocks, k: int) -> Tensor:
    """Of the products of a strip, [..., m, n]."""
    return x.shifts[..., :, None, k].to(torch.int64) + y.shifts[..., None, :, k].to(torch.int64)


def _sums(x: Tensor, y: Tensor) -> Tensor:
    held = torch.float64 if x.is_floating_point() else torch.int32
    return torch.matmul(x.to(held), y.to(held).transpose(-1, -2))


def check_columns(columns: int, bits: int, name: str) -> None:
    """Refuse a product whose sums could leave 32 bits: ``columns`` products of two codes, and a bias.

    Raises:
        SchemeError: an input exists with which the sum overflows.
    """
    most = columns * 127 * (2 ** (bits - 1) - 1) + 2 ** (BIAS_BITS - 1) + columns
    if most >= 2**31:
        raise SchemeError(
            f"{name}: sums of {columns:,} products can reach {most:,}, beyond 32-bit accumulators. Give its weights "
            "fewer bits, or leave the layer out."
        )
