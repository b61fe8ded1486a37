"""Weights by statistics: BiT's signs, TBT's levels and LLM-QAT's 2 bits by their formulas in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nybble.core.errors import SchemeError
from nybble.formats import get_format
from nybble.learned import Learned, make_part
from nybble.learned.statistics import ByStatistics
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer

Method = tuple[str, dict[str, Any]]
"""A quantizer line, and options of the part."""
BIT: Method = ("binary scale=mean", {"center": "tensor", "raw": True})
TERNARY: Method = ("ternary channel scale=max-entropy", {"center": "block", "mask": 1.0})
BINARY: Method = ("binary channel scale=mean", {"center": "block", "mask": 1.0})
CODE: Method = ("ternary channel scale=max-entropy", {})
TWN: Method = ("ternary channel scale=mean(above=0.7)", {"threshold": 0.7})
STATSQ: Method = ("midrise2 channel scale=max-entropy", {"mask": 1.98})


def made(method: Method, x: Tensor) -> Learned:
    found = make_part("statistics", method[1]).make(Quantizer(method[0]), x)
    assert isinstance(found, ByStatistics)
    return found.train()


def stored(method: Method, x: Tensor) -> tuple[Tensor, Tensor]:
    """Values of codes, and scales as they broadcast against the weight."""
    found = made(method, x).settle(x)
    assert isinstance(found, BlockQTensor) and isinstance(found.params.scale, Tensor)
    values = torch.tensor(get_format(found.format.name).values.tolist(), dtype=torch.float64)[found.unpacked().long()]
    return values, found.params.scale.double()


def weight(rows: int = 6, columns: int = 4096, seed: int = 0) -> Tensor:
    """Rows of their own width and mean."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) * torch.linspace(0.2, 2, rows)[:, None]
    return x + torch.linspace(-0.3, 0.4, rows)[:, None]


def by_hand(method: Method, x: Tensor) -> tuple[Tensor, Tensor]:
    """Values and scale by the papers' equations, float64."""
    wide = x.double()
    dim = None if method is BIT else 1
    mean = wide.mean(dim, keepdim=True) if method not in (CODE, STATSQ, TWN) else torch.zeros(1, 1)
    left = wide - mean.float().double()
    if method is BIT:
        return torch.where(left >= 0, 1.0, -1.0), wide.abs().mean().reshape(1, 1)
    size = left.abs().mean(1, keepdim=True)
    if method is BINARY:
        return torch.where(left >= 0, 1.0, -1.0), size
    if method is TWN:
        left = torch.where(left.abs() > 0.7 * size, left.sign(), 0.0)
        return left, (wide * left).sum(1, keepdim=True) / left.abs().sum(1, keepdim=True)
    if method is STATSQ:  # s = 2 mean|w|: s (round(2 w / s - 0.5) + 0.5) / 2, in units of s / 2
        return (2 * (wide / (2 * size)).clamp(-0.99, 0.99) - 0.5).round() + 0.5, size
    return (left / (4 / 3 * size)).clamp(-1, 1).round(), 4 / 3 * size


@pytest.mark.parametrize("method", [BIT, TERNARY, BINARY, CODE, STATSQ, TWN])
def test_equations(method: Method) -> None:
    x = weight()
    values, scale = stored(method, x)
    want, size = by_hand(method, x)
    torch.testing.assert_close(scale.reshape(size.shape), size, rtol=1e-6, atol=0)
    assert (values != want).float().mean() < 1e-4  # at a threshold, the last bit of a scale decides
    part = made(method, x)
    torch.testing.assert_close(part(x).double(), values * scale, rtol=1e-7, atol=0)
    assert torch.equal(part(x), part.eval()(x))


@pytest.mark.parametrize("method", [BIT, TERNARY, BINARY, CODE, STATSQ, TWN])
def test_gradients_element_by_element(method: Method) -> None:
    """Upstream, to the last bit; zero where |w - m| reaches ``mask`` scales, in the forms that have one."""
    x, upstream = weight().requires_grad_(), torch.randn(6, 4096)
    made(method, x.detach())(x).backward(upstream)
    assert x.grad is not None
    if method in (BIT, CODE, TWN):
        assert torch.equal(x.grad, upstream)
        return
    _, size = by_hand(method, x.detach())
    mean = 0.0 if method is STATSQ else x.detach().double().mean(1, keepdim=True)
    distance = (x.detach().double() - mean).abs() - method[1]["mask"] * size
    clear = distance.abs() > 1e-5
    assert torch.equal(x.grad[clear], torch.where(distance < 0, upstream, 0.0)[clear])
    assert 0.01 < (x.grad == 0).float().mean() < 0.6


def test_signs_do_not_see_a_constant() -> None:
    """BiT 1: two values, whose signs stay when all of W is moved; TBT 3: with a centre nothing changes at all."""
    x = torch.randn(8, 64).mul(64).round() / 64  # so that a constant can be added exactly
    values, scale = stored(BIT, x)
    assert set(values.flatten().tolist()) == {-1.0, 1.0} and scale.numel() == 1
    moved, other = stored(BIT, x + 0.5)
    assert torch.equal(values, moved) and not torch.equal(scale, other)
    for method in (TERNARY, BINARY):
        one, two = made(method, x)(x), made(method, x)(x + 0.5)
        torch.testing.assert_close(one, two, rtol=1e-6, atol=0)
    assert not torch.allclose(made(CODE, x)(x), made(CODE, x)(x + 0.5), rtol=0.1)


@pytest.mark.parametrize("method", [BIT, TERNARY, BINARY, CODE, STATSQ, TWN])
@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_scale_equivariance(method: Method, factor: float) -> None:
    x = weight(4, 256)
    torch.testing.assert_close(made(method, x)(factor * x), factor * made(method, x)(x), rtol=1e-6, atol=0)


def test_masses() -> None:
    """TBT 2: a uniform weight has its levels equally likely, a Gaussian 0.297, 0.405, 0.297; signs are in halves."""
    generator = torch.Generator().manual_seed(1)
    uniform, normal = torch.rand(1, 10**6, generator=generator) - 0.2, torch.randn(1, 10**6, generator=generator)
    for x, masses in ((uniform, (1 / 3, 1 / 3, 1 / 3)), (normal, (0.297, 0.405, 0.297))):
        values = stored(TERNARY, x)[0]
        assert [float((values == v).float().mean()) for v in (-1, 0, 1)] == pytest.approx(masses, abs=0.005)
        assert float((stored(BINARY, x)[0] > 0).float().mean()) == pytest.approx(0.5, abs=0.005)
    even = stored(STATSQ, uniform - uniform.mean())[0]
    assert [float((even == v).float().mean()) for v in (-1.5, -0.5, 0.5, 1.5)] == pytest.approx((0.25,) * 4, abs=0.005)


def test_the_scale_is_the_least_squares_one() -> None:
    """BiT 4: 1 % to either side loses more, of a weight whose mean is 0."""
    x = torch.randn(16, 64, dtype=torch.float64)
    x = (x - x.mean()).float()
    values, scale = stored(BIT, x)

    def lost(by: float) -> float:
        return float((x.double() - by * scale * values).square().sum())

    assert lost(1.0) < min(lost(0.99), lost(1.01))


def test_an_embedding_has_a_scale_a_row_and_one_mean() -> None:
    x = weight(5, 96)
    values, scale = stored(("binary channel scale=mean", BIT[1]), x)
    torch.testing.assert_close(scale, x.double().abs().mean(1, keepdim=True), rtol=1e-6, atol=0)
    assert torch.equal(values > 0, x - x.mean() >= 0)


@pytest.mark.parametrize("method", [BIT, TERNARY, BINARY, CODE, STATSQ, TWN])
def test_zeros_constants_and_nothing(method: Method) -> None:
    """A row without a magnitude becomes zeros, where scales are of rows, and its gradient passes; never NaN."""
    x = weight(4, 32)
    x[1], x[2] = 0, 0.75
    part, leaf = made(method, x), x.clone().requires_grad_()
    found = part(leaf)
    found.sum().backward()
    assert found.isfinite().all() and leaf.grad is not None and leaf.grad.isfinite().all()
    if method is not BIT:
        assert (found[1] == 0).all() and (leaf.grad[1] == 1).all()
    if method in (TERNARY, BINARY):  # the mean is all of it
        assert (found[2] == 0).all() and (leaf.grad[2] == 1).all()
    assert torch.equal(part.eval()(x), found.detach())
    empty = torch.empty(0, 32)
    assert made(method, empty)(empty).shape == (0, 32)
    assert part(torch.full((4, 32), torch.nan)).isnan().all()


@pytest.mark.parametrize("method", [TERNARY, TWN])
def test_short_groups_are_measured_alone(method: Method) -> None:
    """The one at a row's end as it would be without what fills it."""
    x = weight(3, 40)
    groups = method[0].replace("channel", "group=16 pad=true scale_format=float32")
    whole, alone = made((groups, method[1]), x)(x), made(method, x[:, 32:])(x[:, 32:])
    torch.testing.assert_close(whole[:, 32:], alone, rtol=1e-6, atol=0)


def test_refusals() -> None:
    for options, said in (
        ({"center": "row"}, "center"), ({"mask": -1.0}, "units of the scale"), ({"raw": True}, "without a center"),
        ({"threshold": -0.7}, "units of mean"),
    ):  # fmt: skip
        with pytest.raises(SchemeError, match=said):
            make_part("statistics", options)
    with pytest.raises(SchemeError, match="keeps one of its own"):
        make_part("statistics", {"center": "block"}).check(Quantizer("binary channel scale=mean(offset=true)"))
    with pytest.raises(SchemeError, match=r"parts the levels -1, 0 and 1.*use ternary"):
        make_part("statistics", {"threshold": 0.7}).check(Quantizer("int4 channel"))
    with pytest.raises(SchemeError, match="learns weights, not activations"):
        make_part("statistics", {}).check(Quantizer("int8 token"), "activations")
