"""Scales from a mean magnitude, and of what is clamped, by their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from nybble.core.errors import UsageError
from nybble.formats import get_format
from nybble.quantizer import Quantizer
from nybble.scales import parse_scale_rule


@pytest.mark.parametrize(
    ("fmt", "by"),
    [
        ("binary", 1), ("ternary", 4 / 3), ("midrise2", 1), ("midrise3", 1 / 2), ("midrise4", 1 / 4), ("int4", 4 / 15),
        ("int4_full", 1 / 4), ("uternary", 2 / 2.5), ("uint1", 2 / 1.5), ("float4_e2m1fn", 4 / 14),
    ],
)  # fmt: skip
def test_max_entropy(fmt: str, by: float) -> None:
    """TBT's 1 and 4/3; StatsQ's 2 mean|x| / 2**(bits - 1); the rest by its cells, which a uniform block fills."""
    x = torch.rand(2, 4001) * (1 if not get_format(fmt).signed else 2) - (get_format(fmt).signed * 1.0)
    scale = parse_scale_rule("max-entropy").fit(x, get_format(fmt), "nearest-even").scale
    torch.testing.assert_close(scale.double(), by * x.double().abs().mean(1, keepdim=True), rtol=1e-6, atol=0)


@pytest.mark.parametrize("fmt", ["binary", "ternary", "midrise2", "midrise3", "int4", "int4_full"])
def test_uniform_values_fill_the_codes_alike(fmt: str) -> None:
    x = (torch.arange(30_000) + 0.5) / 15_000 - 1
    share = torch.bincount(Quantizer(f"{fmt} scale=max-entropy").quantize(x).unpacked().flatten().long())
    share, cells = share[share > 0].double() / len(x), 16 if fmt == "int4_full" else len(get_format(fmt).grid)
    assert (share - 1 / cells).abs().max() < (0.04 if fmt == "int4_full" else 1e-3)  # whose range is no middle's


def test_clamped() -> None:
    """TBT's 8 bits: 127 over the largest magnitude, up to 2.5; beyond it saturates, and a NaN stays one."""
    x = torch.tensor([[0.1, -1.27, 0.5], [40.0, -0.5, 2.5], [0.0, 0.0, 0.0]])
    found = Quantizer("int8 channel scale=clamped").quantize(x)
    assert isinstance(found.params.scale, torch.Tensor)
    torch.testing.assert_close(found.params.scale.flatten(), torch.tensor([1.27, 2.5, 127.0]) / 127)
    assert found.dequantize()[1].tolist() == pytest.approx([2.5, round(-0.5 * 127 / 2.5) * 2.5 / 127, 2.5])
    assert Quantizer("int8 scale=clamped").fake_quantize(torch.tensor([1.0, torch.nan])).isnan().any()
    assert str(Quantizer("int8 scale=clamped(limit=3)")) == "int8 scale=clamped(limit=3)"
    for text in ("clamped(limit=0)", "clamped(limit=-1)", "clamped(limit=inf)"):
        with pytest.raises(UsageError, match="positive"):
            parse_scale_rule(text)


def test_elastic_and_least() -> None:
    x = torch.tensor([[0.2, -0.6, 0.9, -0.1]])
    first = {"binary": 0.9, "int4": 0.9 / math.sqrt(7), "uint1": 1.8, "uternary": 1.8 / math.sqrt(3)}
    for fmt, expected in first.items():
        found = parse_scale_rule("elastic").fit(x, get_format(fmt), "nearest-even").scale
        assert found.item() == pytest.approx(expected, rel=1e-6)
    least = parse_scale_rule("mean(least=0.5)")
    assert least.fit(x, get_format("uint1"), "nearest-even").scale.item() == pytest.approx(0.75)
    assert least.fit(x / 10, get_format("uint1"), "nearest-even").scale.item() == 0
    above = parse_scale_rule("mean(above=0.7)").fit(x, get_format("ternary"), "nearest-even").scale
    assert above.item() == pytest.approx(0.75)  # 0.7 of 0.45 leaves 0.2 and 0.1 out
    for text in ("mean(least=0.5,offset=true)", "mean(least=0.5,above=0.5)", "mean(above=-1)"):
        with pytest.raises(UsageError, match="least"):
            parse_scale_rule(text)
