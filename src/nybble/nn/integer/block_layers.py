"""Embeddings and linear layers in blocks of integers, of packed weights whose scales are powers of two."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.errors import SchemeError
from nybble.granularity.group import PerGroup
from nybble.nn.embedding import TiedHead
from nybble.nn.integer.block_norm import vector
from nybble.nn.integer.block_products import check_columns, product
from nybble.nn.integer.blocks import COARSEST, FINEST, Blocks, in_strips, narrow, spread
from nybble.nn.linear import QuantLinear
from nybble.nn.packed import Packed
from nybble.qtensor import dense
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer
from nybble.scales.pow2 import Pow2

NEAREST = "int8 block=64x64 scale=pow2, int4 block=64x64 scale=pow2"
INPUTS = "int8 group=64 pad=true scale=pow2"
STRIP, LEAST_STRIP = 64, 8
_BIAS = 16


def strip_of(quantizer: Quantizer) -> int:
    """Columns of the strips in which inputs are rounded to 8 bits with measured powers of two; 0: they aren't."""
    cut, scale = quantizer.granularity, quantizer.scale
    plain = isinstance(scale, Pow2) and scale.mode == "floor" and quantizer.format.name == "int8"
    return cut.size if isinstance(cut, PerGroup) and plain and not quantizer.static else 0


class BlockEmbedding(nn.Module):
    """Rows of a table, looked up.

    Args:
        name: for errors. weight: the table. simulate: hold codes in float64.
    """

    def __init__(self, name: str, weight: Packed, simulate: bool = False) -> None:
        super().__init__()
        table = blocks_of(name, weight, STRIP)
        self.register_buffer("codes", table.codes)
        self.register_buffer("shifts", table.shifts)
        self.strip, self.simulate = table.strip, simulate

    def forward(self, ids: Tensor) -> Blocks:  # noqa: D102
        codes = self.get_buffer("codes")[ids]
        return Blocks(codes.double() if self.simulate else codes, self.get_buffer("shifts")[ids], self.strip)


class BlockLinear(nn.Module):
    """A linear layer: sums in 32 bits, narrowed to 8.

    Args:
        name: for errors.
        layer: its weights integers of up to 8 bits, its inputs as :data:`INPUTS`.
    """

    def __init__(self, name: str, layer: QuantLinear | TiedHead) -> None:
        super().__init__()
        self.strip = STRIP if isinstance(layer, TiedHead) else _strip(name, layer)
        weight = blocks_of(name, layer.weight, self.strip)
        check_columns(weight.shape[1], 8, name)
        self.weight_strip = weight.strip
        self.register_buffer("weight", weight.codes)
        self.register_buffer("shifts", weight.shifts)
        bias: Any = layer.bias
        codes, shifts = (None, None) if bias is None else vector(bias.detach(), self.strip, _BIAS)
        self.register_buffer("bias", codes)
        self.register_buffer("bias_shifts", shifts)

    def forward(self, x: Blocks) -> Blocks:  # noqa: D102
        codes, bias_shifts = self._buffers["bias"], self._buffers["bias_shifts"]
        bias = None if codes is None or bias_shifts is None else (codes, bias_shifts)
        weight = Blocks(self.get_buffer("weight"), self.get_buffer("shifts"), self.weight_strip)
        sums, shifts = product(x, weight, bias)
        return narrow(sums, shifts, self.strip)


def _strip(name: str, layer: QuantLinear) -> int:
    found = 0 if layer.inputs is None else strip_of(layer.inputs.quantizer)
    if not found or layer.outputs is not None:
        came = "stays in float" if layer.inputs is None else f"is {layer.inputs.quantizer}"
        raise SchemeError(
            f"{name}: what enters it {came}; blocks of integers are {INPUTS}, and what leaves is rounded "
            "anyway. Quantize by the recipe bct."
        )
    return found


def blocks_of(name: str, weight: Packed | nn.Parameter, strip: int) -> Blocks:
    """A matrix [rows, columns] as codes and a shift for each strip of a row.

    Strips are halved until each has one scale: blocks that lie across rows end where they end.

    Raises:
        SchemeError: other weights than integers of up to 8 bits with powers of two that strips share.
    """
    found = weight.qtensor() if isinstance(weight, Packed) else None
    plain = isinstance(found, BlockQTensor) and found.format.is_integer and found.format.bits <= 8
    if not isinstance(found, BlockQTensor) or not plain or found.params.grid is not None:
        raise SchemeError(f"{name}: its weights are not integers of up to 8 bits. Quantize them as one of: {NEAREST}.")
    params = found.params
    if params.zero_point is not None or params.offset is not None or found.format.min < -127:
        raise SchemeError(f"{name}: blocks of integers have no zero points or offsets. Quantize as one of: {NEAREST}.")
    table = torch.from_numpy(found.format.values.copy()).to(torch.int8)
    codes = table.to(found.codes.device)[found.unpacked().long()].reshape(found.shape)
    each = _shifts(name, found)
    while strip >= LEAST_STRIP:
        shifts = in_strips(each, strip, 2**15).amin(-1)
        if torch.equal(spread(shifts, strip, each.shape[1]), each):
            zeros = in_strips(codes, strip).abs().amax(-1) == 0
            return Blocks(codes, torch.where(zeros, FINEST, shifts).to(torch.int8), strip)
        strip //= 2
    raise SchemeError(
        f"{name}: {LEAST_STRIP} neighbours of a row don't share a scale. Quantize it as one of: {NEAREST}."
    )


def _shifts(name: str, found: BlockQTensor) -> Tensor:
    """int32 [rows, columns]."""
    scale = found.params.scale
    device = found.codes.device
    values = torch.ones(1, device=device) if scale is None else dense(scale).float().reshape(-1)  # type: ignore[arg-type]
    fraction, exponent = torch.frexp(values)
    if not bool((fraction == 0.5).all()):
        raise SchemeError(f"{name}: its scales are not powers of two. Quantize it as one of: {NEAREST}.")
    shifts = 1 - exponent
    if int(shifts.min()) < COARSEST or int(shifts.max()) > FINEST:
        raise SchemeError(f"{name}: its scales are beyond 2^-127 to 2^128, which shifts of 8 bits can't hold.")
    blocks = found.granularity.to_blocks(torch.zeros(found.shape, device=device))
    of_each = shifts.to(torch.int32).reshape(-1, 1).expand(blocks.shape).contiguous()
    return found.granularity.from_blocks(of_each, found.shape)
