"""Learned weight clipping: OmniQuant's equations in float64, against autograd of the formula written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nybble.learned import Learned, make_part
from nybble.learned.clip import LearnedRange
from nybble.qtensor import dense
from nybble.quantizer import Quantizer


def learned(line: str, x: Tensor, **options: object) -> LearnedRange:
    found: Learned = make_part("clip", options).make(Quantizer(line), x)
    assert isinstance(found, LearnedRange)
    return found.train()


def weight() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return (torch.randn(4, 16, generator=generator) + 0.2) * torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])


def ste(y: Tensor) -> Tensor:
    return y + (y.round() - y).detach()


def asymmetric(w: Tensor, gamma: Tensor, beta: Tensor, bits: int) -> Tensor:
    """As published, for rows that hold zero: h, z and the fake-quantized weight."""
    high, low = torch.sigmoid(gamma) * w.amax(1, keepdim=True), torch.sigmoid(beta) * w.amin(1, keepdim=True)
    h = (high - low) / (2**bits - 1)
    z = (-low / h).round().detach()
    found: Tensor = ((ste(w / h) + z).clamp(0, 2**bits - 1) - z) * h
    return found


def symmetric(w: Tensor, gamma: Tensor, beta: Tensor, bits: int) -> Tensor:
    high, low = torch.sigmoid(gamma) * w.amax(1, keepdim=True), torch.sigmoid(beta) * w.amin(1, keepdim=True)
    h = torch.maximum(high.abs(), low.abs()) / (2 ** (bits - 1) - 1)
    found: Tensor = ste(w / h).clamp(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1) * h
    return found


@pytest.mark.parametrize(
    ("line", "formula"), [("uint{} channel symmetric=false", asymmetric), ("int{} channel", symmetric)]
)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_equations(bits: int, line: str, formula: object) -> None:
    x, upstream = weight(), torch.randn(4, 16)
    part = learned(line.format(bits), x)
    with torch.no_grad():
        part.gamma.copy_(torch.tensor([[4.0], [2.0], [0.5], [1.0]]))
        part.beta.copy_(torch.tensor([[3.0], [1.5], [4.0], [0.8]]))
    mine = x.clone().requires_grad_()
    found = part(mine)
    (found * upstream).sum().backward()
    theirs = x.double().requires_grad_()
    gamma, beta = (p.detach().double().requires_grad_() for p in (part.gamma, part.beta))
    expected = formula(theirs, gamma, beta, bits)  # type: ignore[operator]
    (expected * upstream).sum().backward()
    torch.testing.assert_close(found.detach().double(), expected.detach(), rtol=1e-6, atol=1e-6)
    for one, other in ((mine, theirs), (part.gamma, gamma), (part.beta, beta)):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-4)
    assert part.gamma.grad.abs().sum() > 0 and part.beta.grad.abs().sum() > 0  # type: ignore[union-attr]


def test_begins_at_98_percent_and_30_is_round_to_nearest() -> None:
    x = weight()
    whole = dense(Quantizer("int4 channel").fit(x).scale)  # type: ignore[arg-type]
    scale = learned("int4 channel", x).params(x).scale
    assert isinstance(scale, Tensor)
    torch.testing.assert_close(scale / whole, torch.full((4, 1), 0.98201379), rtol=1e-6, atol=0)
    for line in (
        "uint4 channel symmetric=false",
        "int3 group=8",
        "nvfp4",
        "float4_e2m1fn channel scale=minmax(offset=true)",
    ):
        exact = learned(line, x, start=30.0)
        assert torch.equal(exact(x).detach(), Quantizer(line).fake_quantize(x))


def test_the_range_follows_the_weight_and_short_groups_own_theirs() -> None:
    x = weight()
    for line in (
        "int4 group=12 pad=true",
        "int4 group=12 pad=true symmetric=false",
        "float4_e2m1fn flat=12",
        "float4_e2m1fn group=12 pad=true scale=minmax(offset=true)",
    ):
        part = learned(line, x, start=30.0)
        for other in (3 * x, x + 5, -x.abs() - 1):
            assert torch.equal(part.eval()(other), Quantizer(line).fake_quantize(other))


def test_heavy_tails_are_clipped() -> None:
    """At 2 bits the learned share falls clearly below its start, and the error below round-to-nearest's."""
    x = torch.distributions.StudentT(torch.tensor(3.0)).sample(torch.Size((8, 64)))
    line = "uint2 channel symmetric=false"
    part = learned(line, x)
    optimizer = torch.optim.Adam(part.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        (part(x) - x).square().mean().backward()
        optimizer.step()
    assert torch.sigmoid(part.gamma).mean() < 0.9 and torch.sigmoid(part.beta).mean() < 0.9
    nearest = (Quantizer(line).fake_quantize(x) - x).square().mean()
    assert (part.eval()(x) - x).square().mean() < 0.8 * nearest


def test_zeros_stay_finite() -> None:
    x = torch.zeros(3, 16)
    for line in ("int4 channel", "uint4 channel symmetric=false", "nvfp4"):
        part = learned(line, x)
        part(x).sum().backward()
        stored, own = part.settle(x), Quantizer(line).quantize(x)
        assert all(torch.equal(value, own.tensors()[key]) for key, value in stored.tensors().items())
        assert (part(x) == 0).all() and part.gamma.grad is not None and part.gamma.grad.isfinite().all()
