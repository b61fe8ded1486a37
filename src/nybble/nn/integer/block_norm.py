"""Layer norm of blocks: integer mean and variance, a square root by Newton's steps, weight and bias as integers.

Source: BCT (arXiv:2304.01483), with I-BERT's (arXiv:2101.01321) square root.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nybble.core.errors import DataError
from nybble.nn.integer.blocks import Blocks, narrow
from nybble.nn.integer.layer_norm import integer_sqrt
from nybble.nn.integer.shifts import shift_right

GUARD = 12
"""Bits below the coarsest strip's codes in which a row is put to one scale."""
_UNIT, _SQUARES, _WHOLE = 15, 50, 40


class BlockNorm(nn.Module):
    """``(x - mean) / sqrt(var + eps) * weight + bias``.

    Args:
        weight: [n], floats; rounded to 15 bits and a sign, a shift a strip. bias: as ``weight``.
        eps: of the float layer.
        strip: columns of a strip.
    """

    def __init__(self, weight: Tensor, bias: Tensor, eps: float, strip: int) -> None:
        super().__init__()
        self.strip = strip
        n = len(weight)
        self.finest = math.floor((_SQUARES - math.log2(n * eps)) / 2)  # with which n eps fits beside the squares
        self.eps = round(n * eps * 4.0**self.finest)
        (w, w_shifts), (b, b_shifts) = (vector(values, strip, _UNIT + 1) for values in (weight, bias))
        at_most = b_shifts + _UNIT  # so that a bias is not shifted far to the left
        self.register_buffer("weight", shift_right(w, (w_shifts - at_most).clamp(min=0)))
        self.register_buffer("weight_shifts", torch.minimum(w_shifts, at_most))
        self.register_buffer("bias", b)
        self.register_buffer("bias_shifts", b_shifts)

    def forward(self, x: Blocks) -> Blocks:  # noqa: D102
        common = (x.shifts.amin(-1, keepdim=True).to(torch.int64) + GUARD).clamp(max=self.finest)
        y = self._normalized(shift_right(x.wide(), x.each() - common), common)
        weight, bias = (self.get_buffer(name).to(y.dtype) for name in ("weight", "bias"))
        shifts = self.get_buffer("weight_shifts") + _UNIT
        return narrow(y * weight + shift_right(bias, self.get_buffer("bias_shifts") - shifts), shifts, self.strip)

    def _normalized(self, q: Tensor, common: Tensor) -> Tensor:
        """``(q - mean) / deviation``, times 2^15."""
        n = q.shape[-1]
        y = q - _divided(q.sum(-1, keepdim=True), n)
        eps = shift_right(torch.full_like(common, self.eps).to(q.dtype), 2 * (self.finest - common))
        squares = (y * y).sum(-1, keepdim=True) + eps
        root = torch.floor(torch.sqrt(squares)) if q.is_floating_point() else integer_sqrt(squares)
        return _divided(y * round(math.sqrt(n) * 2**_UNIT), root.clamp(min=1))


def _divided(q: Tensor, by: Tensor | int) -> Tensor:
    """``round(q / by)``, half up."""
    if q.is_floating_point():
        return torch.floor((2 * q + by) / (2 * by))  # exact: numerators are below 2^53, and so are quotients' gaps
    return torch.div(2 * q + by, 2 * by, rounding_mode="floor")


def vector(values: Tensor, strip: int, bits: int) -> tuple[Tensor, Tensor]:
    """A constant vector as codes of up to 16 bits, and the shift of each: int64 [n] both.

    Raises:
        DataError: values that aren't finite, or beyond 2^19.
    """
    if not bool((values.abs() < 2**19).all()):
        raise DataError("biases and weights of norms in integers are finite and below 2^19.")
    wide = torch.round(values.double() * 2.0**_WHOLE).to(torch.int64)
    found = narrow(wide, torch.full_like(wide, _WHOLE), strip, bits)
    return found.codes.to(torch.int64), found.each()
