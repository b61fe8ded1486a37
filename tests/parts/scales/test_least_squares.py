"""Scales by least squares: never worse than one-shot rules, as stored, and than ggml's own quantizers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.parts.models import ggml
from torch import Tensor

from nybble.core.errors import UsageError
from nybble.models.gguf.types import REGISTRY, decode
from nybble.quantizer import Quantizer

SEARCHED = ("q2-k", "q3-k", "q4-k", "q5-k", "q6-k", "iq4-nl", "iq4-xs", "q4-0", "q4-1", "q5-0", "q5-1", "q8-0")


def loss(x: Tensor, y: Tensor, weight: Tensor) -> float:
    return float((weight * (x - y).double().square()).sum())


def weights(heavy: bool) -> Tensor:
    x = torch.randn(64, 512) * 0.02
    return x * torch.exp(0.7 * torch.randn(64, 512)) if heavy else x


@pytest.mark.skipif(not ggml.found(), reason="the oracle: pip install libggml-python")
@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("name", SEARCHED)
def test_at_most_the_error_of_ggml(name: str, heavy: bool) -> None:
    """Weighted by an imatrix, and without one; the sum over 32,768 weights."""
    kind, x = REGISTRY.get(name), weights(heavy)
    for importance in (None, torch.rand(512) ** 4 * 10 + 0.01):
        given = None if importance is None else importance.numpy()
        data = ggml.quantize_chunk(kind.number, x.numpy(), given)
        theirs = decode(kind, data, (64, 512)).dequantize()
        weight = torch.ones(512) if importance is None else importance
        quantizer = kind.quantizer
        ours = quantizer.fake_quantize(x, quantizer.fit(x, None if importance is None else importance[None]))
        assert loss(x, ours, weight) <= loss(x, theirs, weight), importance is None


@pytest.mark.parametrize(
    ("line", "plain"),
    [
        ("int4_full group=32 scale=least-squares", "int4_full group=32 scale=extreme"),
        ("float4_e2m1fn group=16 scale=least-squares", "float4_e2m1fn group=16"),
        ("uint4 channel scale=least-squares(offset=true)", "uint4 channel scale=minmax(offset=true)"),
        (
            "uint4 group=32 scale=least-squares(offset=true) scale_format=(uint6 group=4) offset_format=(int6 group=4)",
            "uint4 group=32 scale=minmax(offset=true) scale_format=(uint6 group=4) offset_format=(int6 group=4)",
        ),
        (
            "int3_full group=16 scale=least-squares scale_format=(float8_e4m3fn group=8)",
            "int3_full group=16 scale=extreme scale_format=(float8_e4m3fn group=8)",
        ),
    ],
)
def test_less_error_than_one_shot(line: str, plain: str) -> None:
    """Any format, granularity and nesting."""
    x = weights(True)
    ours, theirs = (Quantizer(each).fake_quantize(x) for each in (line, plain))
    assert loss(x, ours, torch.ones(1)) < 0.95 * loss(x, theirs, torch.ones(1))


def test_one_block_is_as_good_as_the_best_of_many_scales() -> None:
    """Against every scale on a fine grid, each with its nearest codes."""
    x = torch.randn(20, 32)
    found = Quantizer("int4_full group=32 scale=least-squares scale_format=float32").fake_quantize(x)
    best = torch.full((20, 1), torch.inf)
    for sign in (-1, 1):
        for fraction in np.linspace(0.6, 1.4, 2000):
            scale = sign * fraction * x.abs().amax(1, keepdim=True) / 8
            error = ((x / scale).round().clamp(-8, 7) * scale - x).square().sum(1, keepdim=True)
            best = torch.minimum(best, error)
    error = (found - x).square().sum(1, keepdim=True)
    assert float(error.sum() / best.sum()) < 1.005


def test_what_is_on_the_grid_stays() -> None:
    scale = torch.tensor([[0.5], [2.0]])
    codes = torch.randint(-8, 8, (2, 64))
    codes[:, ::32], codes[:, 1::32] = -8, 7
    x = codes * scale
    assert torch.equal(Quantizer("q4_0").fake_quantize(x), x)


def test_importance_moves_the_scale() -> None:
    x = torch.randn(4, 256)
    importance = torch.ones(256)
    importance[::32] = 1e4
    quantizer = Quantizer("q4_k")
    plain = quantizer.quantize(x)
    weighed = quantizer.quantize(x, quantizer.fit(x, importance[None]))
    errors = [(each.dequantize() - x)[:, ::32].square().sum() for each in (plain, weighed)]
    assert errors[1] < 0.2 * errors[0]


def test_shapes_sizes_and_repeats() -> None:
    """The meta device knows the sizes; the same input gives the same bytes; groups far apart don't touch."""
    quantizer, x = Quantizer("q4_k"), torch.randn(600, 512)
    assert quantizer.stored_bytes((600, 512)) == 600 * 2 * 144
    first, second = quantizer.quantize(x), quantizer.quantize(x.clone())
    assert all(torch.equal(a, b) for a, b in zip(first.tensors().values(), second.tensors().values(), strict=True))
    alone = quantizer.quantize(x[590:])
    assert torch.equal(first.dequantize()[590:], alone.dequantize())


def test_options() -> None:
    with pytest.raises(UsageError, match="at least two clip values and one round"):
        Quantizer("int4 group=32 scale=least-squares(grid=1)")
