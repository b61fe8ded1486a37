"""Packed weights of layers as plain integer codes and scales; biases at the scale of the sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nybble.core.errors import SchemeError
from nybble.nn.layer import QuantLayer
from nybble.nn.packed import Packed
from nybble.qtensor.block import BlockQTensor

_BIAS = 2**30
"""Biases leave half of the accumulator to the products."""


@dataclass(frozen=True)
class Codes:
    """``weight``: int64 codes, [out, in]; ``bias``: int64, [out]; ``scale``: of the sums, float64, [out]."""

    weight: Tensor
    bias: Tensor
    scale: Tensor


def codes_of(name: str, layer: QuantLayer, entering: float) -> Codes:
    """A layer's constants.

    Where a folded BatchNorm left a channel with next to no weights, its scale would put the bias beyond 32 bits: such a
    channel's codes are halved until it fits. They moved the sum by less than 2^-22 of the bias.

    Args:
        name: for errors.
        layer: with integer weights of up to 8 bits that have one scale a row, or one.
        entering: scale of what enters.

    Raises:
        SchemeError: other weights.
    """
    weight, scale = _matrix(name, layer.weight)
    bias = layer.bias.double() if isinstance(layer.bias, Tensor) else torch.zeros(len(weight), dtype=torch.float64)
    sums = scale * entering
    halvings = torch.log2((bias.abs() / sums / _BIAS).clamp(min=1)).ceil()
    sums = torch.ldexp(sums, halvings)
    weight = torch.round(torch.ldexp(weight.double(), -halvings[:, None])).to(torch.int64)
    return Codes(weight, torch.round(bias / sums).to(torch.int64), sums)


def _matrix(name: str, weight: Packed | nn.Parameter) -> tuple[Tensor, Tensor]:
    """Codes [out, in] and scales [out], float64."""
    found = weight.qtensor() if isinstance(weight, Packed) else None
    plain = isinstance(found, BlockQTensor) and found.format.is_integer and found.format.bits <= 8
    if not isinstance(found, BlockQTensor) or not plain or found.params.grid is not None:
        raise SchemeError(
            f"{name}: its weights are not integers of up to 8 bits. Quantize them as int8 channel or int4 channel."
        )
    params = found.params
    shifted = params.zero_point is not None or params.offset is not None
    if shifted or str(found.granularity) not in ("channel", "tensor") or not isinstance(params.scale, Tensor):
        raise SchemeError(
            f"{name}: integers alone need weights with one scale a row and no zero point or offset. Quantize them as "
            "int8 channel or int4 channel."
        )
    table = torch.from_numpy(found.format.values.copy()).to(torch.int64)
    codes = table[found.unpacked().long()].reshape(found.shape)
    return codes, params.scale.double().reshape(-1).expand(found.shape[0])
