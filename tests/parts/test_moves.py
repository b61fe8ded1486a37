"""What the report says of a layer that learned: shares and ratios, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nybble.nn.layer import QuantLayer
from nybble.nn.linear import QuantLinear
from nybble.qtensor import QTensor
from nybble.qtensor.block import BlockQTensor
from nybble.qtensor.split import SplitQTensor
from nybble.quantizer import Quantizer
from nybble.reconstruction.moves import moves

LINE = Quantizer("int4 channel symmetric=false scale_format=float32")


def layer(weight: QTensor) -> QuantLayer:
    return QuantLinear(weight, None, None, None)


def moved(packed: BlockQTensor) -> BlockQTensor:
    """Of the first row the zero point goes up by one, with its codes; of the others the scale doubles."""
    raw = LINE.soften(packed.params)
    assert isinstance(raw.zero_point, Tensor) and isinstance(raw.scale, Tensor)
    zero, scale = raw.zero_point.clone(), raw.scale.clone()
    zero[0] += 1
    scale[1:] *= 2
    return LINE.pack(packed.unpacked(), replace(raw, zero_point=zero, scale=scale))


def test_zero_points_and_scales() -> None:
    weight = torch.randn(4, 16)
    packed = LINE.quantize(weight)
    assert isinstance(packed, BlockQTensor)
    found = moves(weight, LINE, layer(packed), layer(moved(packed)))
    assert found["zero_points"] == 0.25 and found["scales"] == [1.0, 2.0, 2.0]
    nearest = LINE.quantize(weight, moved(packed).params).dequantize()
    left = float((moved(packed).dequantize() != nearest).float().mean())
    assert found["left_nearest"] == pytest.approx(left, rel=1e-3) and left > 0.3


def test_of_columns_apart_it_is_those_that_learned() -> None:
    """Each part is compared with its own columns of the weight."""
    weight = torch.randn(4, 16) * torch.linspace(0.1, 3, 16)
    columns = torch.tensor([1, 4, 9, 12, 3])
    others = torch.tensor([i for i in range(16) if i not in columns.tolist()])
    own = LINE.quantize(weight.index_select(1, others))
    assert isinstance(own, BlockQTensor)
    index = torch.cat([columns, others]).to(torch.int32)
    was, now = (
        SplitQTensor(shape=(4, 16), dim=1, index=index, parts=(weight.index_select(1, columns), part))
        for part in (own, LINE.pack(own.unpacked(), own.params))
    )
    assert moves(weight, LINE, layer(was), layer(now))["left_nearest"] == 0.0
