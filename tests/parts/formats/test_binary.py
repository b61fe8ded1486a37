"""Golden values: number-formats sheet, section 11: {-1, +1}, sign(0) = +1."""

from __future__ import annotations

import pytest
import torch

from nybble.formats import get_format
from nybble.ops.rounding import encode, round_to
from nybble.quantizer import Quantizer
from nybble.rounding import REGISTRY


@pytest.mark.parametrize("rounding", [name for name, part in REGISTRY.all().items() if part.tie_up is not None])
def test_zero_is_plus_one(rounding: str) -> None:
    x = torch.tensor([-3.0, -1e-45, -0.0, 0.0, 1e-45, 3.0])
    assert round_to(x, "binary", rounding).tolist() == [-1, -1, 1, 1, 1, 1]
    assert encode(x, "binary", rounding).tolist() == [0, 0, 1, 1, 1, 1]


def test_least_squares_scale() -> None:
    """alpha = mean|w|."""
    w = torch.randn(4, 256)
    q = Quantizer("xnor").quantize(w)
    assert torch.allclose(q.dequantize().abs()[:, :1], w.abs().mean(1, keepdim=True))
    assert q.codes.numel() == w.numel() // 8 and get_format("binary").grid.tolist() == [-1, 1]
