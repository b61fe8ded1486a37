"""Three levels without a sign: ternary-binary-nlg sheet, elastic activations."""

from __future__ import annotations

import torch

from nybble.formats import get_format
from nybble.quantizer import Quantizer


def test_golden_values() -> None:
    fmt = get_format("uternary")
    assert fmt.bits == 2 and fmt.grid.tolist() == [0, 1, 2] and fmt.produced == {0, 1, 2} and not fmt.signed


def test_formula() -> None:
    """a round(clip(x / a, 0, 2)), ties to even; the fourth code is never produced."""
    x = torch.arange(-8, 20) / 4.0
    found = Quantizer("uternary scale=fixed(value=0.5)").quantize(x)
    assert torch.equal(found.dequantize(), 0.5 * (x / 0.5).clamp(0, 2).round()) and int(found.unpacked().max()) == 2
