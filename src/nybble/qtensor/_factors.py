"""Scales made of factors: rank-1 slice maxima, and one scale with a power of two for each column."""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.core.errors import SchemeError
from nybble.formats import NumberFormat
from nybble.formats.integer import IntFormat
from nybble.formats.minifloat import Minifloat
from nybble.ops.scaling import divided
from nybble.qtensor import Factored


def rank1_scale(x: Tensor, fmt: NumberFormat) -> Factored:
    """Slice maxima over each dimension, combined by their minimum; a zero slice gets 1."""
    magnitude = divided(x.abs(), fmt.absmax)
    factors = []
    for dim in range(x.dim()):
        others = [d for d in range(x.dim()) if d != dim]
        top = magnitude.amax(others, keepdim=True) if others else magnitude.amax(keepdim=True).reshape(1)
        factors.append(torch.where(top == 0, torch.ones_like(top), top))
    return Factored(tuple(factors), "min")


def shift_limit(fmt: NumberFormat, bits: int = 0) -> int:
    """Largest shift of ``bits`` bits; of 0 bits, what the format's exponent can hold, 2^e - 1 (INT4 is E1M2: e = 1).

    Raises:
        SchemeError: the format has no exponent, and no bits were given.
    """
    if bits:
        return int(2**bits - 1)
    if isinstance(fmt, Minifloat):
        return int(2**fmt.e - 1)
    if isinstance(fmt, IntFormat):
        return 1
    raise SchemeError(f"shifted columns: {fmt.name} has no exponent to take the shifts' width from; say shifted=3.")


def column_shifts(columns: Tensor, top: Tensor, limit: int) -> Tensor:
    """Integer shifts of LLM-FP4's pre-shifted exponent bias: ``s_j = clip(round(log2(top / max|x_j|)), 0, limit)``.

    Liu et al. 2023, arXiv:2310.16836, eq. 10-12, with rho and b_j written as largest values instead of biases.

    Args:
        columns: float32 [columns], largest magnitude of each; a column of zeros gets ``limit``.
        top: float32, one element or [candidates, 1]: the largest value that the tensor's own scale can hold.
        limit: the largest shift.

    Returns:
        float32 [columns], or [candidates, columns].
    """
    return (top / columns).log2().round().nan_to_num(nan=0.0, posinf=limit).clamp(0, limit)


def shifted_scale(columns: Tensor, fmt: NumberFormat, dims: int, bits: int = 0) -> Factored:
    """The scale of the loudest column, and 2^-s_j for each column; broadcasts against ``dims`` dimensions."""
    limit, top = shift_limit(fmt, bits), columns.max().reshape(1)
    shifts = column_shifts(columns, top, limit)
    scale = divided(torch.where(top == 0, torch.full_like(top, fmt.absmax), top), fmt.absmax)
    ones = (1,) * (dims - 1)
    return Factored((scale.reshape(*ones, 1), torch.exp2(-shifts).reshape(*ones, -1)))
