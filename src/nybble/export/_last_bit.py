"""Whether NVFP4's scales keep their values where a factor above them is written as a divisor, or the other way round.

``scale * f`` and ``scale / c`` round apart: of a power of two both are exact; else a float32's last bit may move, which
no 16-bit product shows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.export._reciprocal import reciprocals
from nybble.export._source import Source
from nybble.qtensor import Inverse, QTensor
from nybble.qtensor.block import BlockQTensor

_E4M3 = torch.float8_e4m3fn
_ALL = torch.arange(1, 127, dtype=torch.uint8)
"""Codes of every positive scale; no weight has a sign there."""


def outer_of(weight: QTensor) -> Tensor | Inverse | None:
    """What is above the scales of an NVFP4 weight; None of others, and where nothing is."""
    scale = weight.params.scale if isinstance(weight, BlockQTensor) else None
    if not isinstance(scale, BlockQTensor) or scale.format.name != "float8_e4m3fn" or scale.params.offset is not None:
        return None
    return scale.params.scale if isinstance(scale.params.scale, Tensor | Inverse) else None


def same(codes: Tensor, outer: Tensor | Inverse, written: float) -> bool:
    """Whether scales have the same float32 values under the reciprocal kind of number.

    Args:
        codes: uint8, E4M3's, that occur.
        outer: a factor, or a divisor.
        written: a divisor for a factor, a factor for a divisor.
    """
    scales, other = codes.view(_E4M3).float(), torch.tensor(written, dtype=torch.float32)
    if isinstance(outer, Inverse):
        return torch.equal(scales / outer.divisor.float().reshape(()), scales * other)
    return torch.equal(scales * outer.float().reshape(()), scales / other)


def exact_reciprocal(codes: Tensor, outer: Tensor | Inverse) -> float | None:
    """The number of the other kind that gives these scales the same float32 values; None where there is none."""
    used = torch.unique(codes)
    value = outer.divisor if isinstance(outer, Inverse) else outer
    return next((found for found in reciprocals(value) if same(used, outer, found)), None)


def moves(source: Source, prefix: str, weight: QTensor, written: float) -> bool:
    """Whether a value of a weight moves if ``written`` stands above its scales, as the other kind of number.

    Args:
        source: of the numbers: the one above is read, and the scales where not all that there are stay the same.
        prefix: of the weight's tensors.
        weight: its description.
        written: see :func:`same`.
    """
    outer = outer_of(weight)
    if outer is None:
        return False
    divides = isinstance(outer, Inverse)
    value = source.tensor(f"{prefix}.scale.scale.divisor" if divides else f"{prefix}.scale.scale")
    found = Inverse(value) if divides else value
    return not same(_ALL, found, written) and not same(
        torch.unique(source.tensor(f"{prefix}.scale.codes")), found, written
    )
