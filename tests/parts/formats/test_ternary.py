"""Golden values: number-formats sheet, section 11: b1.58, and five digits to a byte."""

from __future__ import annotations

import torch

from nybble.formats import get_format
from nybble.quantizer import Quantizer


def test_values() -> None:
    fmt = get_format("ternary")
    assert fmt.grid.tolist() == [-1, 0, 1] and fmt.produced == {0, 1, 3}


def test_b158() -> None:
    """alpha = mean|w|, q = clamp(round(w / alpha), -1, 1)."""
    w = torch.randn(16, 64)
    alpha = w.abs().mean()
    want = (w / alpha).round().clamp(-1, 1) * alpha
    assert torch.allclose(Quantizer("b1.58").fake_quantize(w), want, atol=1e-6)


def test_bits() -> None:
    w = torch.randn(100, 100)
    assert Quantizer("b1.58").quantize(w).codes.numel() * 8 / w.numel() == 2
    assert Quantizer("b1.58 packing=base3").quantize(w).codes.numel() * 8 / w.numel() == 1.6
