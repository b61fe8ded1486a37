"""A block's range as a share of its extremes, and the scale that spreads it over a format."""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.formats import NumberFormat
from nybble.ops.blocks import safe_divisor
from nybble.ops.scaling import divided, guarded
from nybble.qtensor import QuantParams
from nybble.quantizer import Quantizer
from nybble.scales import BlockParams
from nybble.scales.absmax import AbsMax
from nybble.scales.minmax import MinMax


def has_range(quantizer: Quantizer) -> bool:
    """Whether every block has a range of its own that its scale comes from."""
    plain = not (quantizer.granularity.factored or quantizer.center)
    return plain and isinstance(quantizer.scale, AbsMax | MinMax)


def shared_range(quantizer: Quantizer, x: Tensor, upper: Tensor, lower: Tensor) -> QuantParams:
    """Raw parameters for the range ``lower min(x) .. upper max(x)``, with gradients to the shares and to x.

    Args:
        quantizer: with a range (:func:`has_range`).
        x: the tensor.
        upper: shares of the blocks' largest values, float32 of the granularity's scale shape.
        lower: of the smallest.
    """
    shape = upper.shape
    blocks = quantizer.granularity.to_blocks(x).float()
    mask = quantizer.granularity.mask(x.shape, x.device)
    above = blocks if mask is None else torch.where(mask, blocks, -torch.inf)
    below = blocks if mask is None else torch.where(mask, blocks, torch.inf)
    high = upper.reshape(-1, 1) * above.amax(1, keepdim=True)
    low = lower.reshape(-1, 1) * below.amin(1, keepdim=True)
    rule = quantizer.scale
    if isinstance(rule, MinMax):
        found = _spread(low, high, quantizer.format, rule.offset)
    else:
        assert isinstance(rule, AbsMax)
        target = rule.target or quantizer.format.absmax
        found = BlockParams(divided(torch.maximum(high.abs(), low.abs()), target))
    scale = found.scale.reshape(shape)
    if isinstance(quantizer.scale_format, str):
        scale = guarded(scale, quantizer.format)
    zero, offset = (None if v is None else v.reshape(shape) for v in (found.zero_point, found.offset))
    return QuantParams(scale, zero, offset)


def _spread(low: Tensor, high: Tensor, fmt: NumberFormat, offset: bool) -> BlockParams:
    """As :func:`nybble.scales.minmax.fit_range`, of ranges that float32 holds: a branch has its gradient's cost."""
    if not offset:
        low, high = low.clamp(max=0), high.clamp(min=0)
    scale = divided(high - low, fmt.max - fmt.min)
    if offset:
        return BlockParams(scale, offset=low - scale * fmt.min)
    # whole numbers have no gradient: none is calculated
    zero = torch.round(fmt.min - low.detach() / safe_divisor(scale.detach())).clamp(fmt.min, fmt.max)
    return BlockParams(scale, zero_point=zero)
