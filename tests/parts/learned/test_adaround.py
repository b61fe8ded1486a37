"""AdaRound: its equations in float64, on integer and float grids; always one of the two neighbours."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nybble.core.errors import SchemeError
from nybble.formats import get_format
from nybble.learned import Learned, make_part
from nybble.learned._rectified import Deciding, annealed, logits_of, rectified
from nybble.learned.adaround import UpOrDown
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer

LINES = (
    "int4 channel", "int3 group=8 symmetric=false", "float4_e2m1fn channel", "float4_e1m2_finite group=8",
    "float4_e3m0_finite group=8", "nf4 flat=40", "nvfp4", "float4_e2m1fn group=8 scale=mse",
)  # fmt: skip


def learned(line: str, x: Tensor, **options: object) -> UpOrDown:
    found: Learned = make_part("adaround", options).make(Quantizer(line), x)
    assert isinstance(found, UpOrDown)
    return found.train()


def weight(columns: int = 64) -> Tensor:
    x = torch.randn(6, columns)
    x[0, :4] = torch.tensor([0.0, -0.0, 1e-6, -1e-6])
    return x


def by_numpy(x: Tensor, line: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower and upper neighbours of w / s, and s: floor, floor + 1 on the sorted values; w / s in float32."""
    quantizer = Quantizer(line)
    params = quantizer.soften(quantizer.harden(quantizer.fit(x)))
    scale = quantizer.granularity.expand(params.scale, x.shape).double().numpy()  # type: ignore[arg-type]
    zero: Any = 0.0
    if params.zero_point is not None:
        zero = quantizer.granularity.expand(params.zero_point, x.shape).double().numpy()  # type: ignore[arg-type]
    y = (x.numpy() / scale.astype(np.float32)).astype(np.float64) + zero
    grid = get_format(quantizer.format.name).grid
    above = np.searchsorted(grid, y, side="right")
    lower, upper = grid[np.maximum(above - 1, 0)], grid[np.minimum(above, len(grid) - 1)]
    return lower - zero, upper - zero, np.broadcast_to(scale, y.shape)


@pytest.mark.parametrize("scale_aware", [False, True])
@pytest.mark.parametrize("line", LINES)
def test_begins_at_the_float_weight(line: str, scale_aware: bool) -> None:
    """FP4DiT's check 1: the soft weight is the clipped weight, to float32's resolution of the largest."""
    x = weight()
    found = learned(line, x, scale_aware=scale_aware)(x).detach()
    lower, upper, scale = by_numpy(x, line)
    clipped = np.clip(x.double().numpy(), np.minimum(lower, upper) * scale, upper * scale)
    assert np.abs(found.double().numpy() - clipped).max() < 2e-6 * float(x.abs().max())


@pytest.mark.parametrize("scale_aware", [False, True])
@pytest.mark.parametrize("line", LINES)
def test_equations(line: str, scale_aware: bool) -> None:
    """w_hat = s (lower + h(V) (upper - lower)) and its gradient, with any V."""
    x = weight()
    part, upstream = learned(line, x, scale_aware=scale_aware), torch.randn(x.shape)
    lower, upper, scale = by_numpy(x, line)
    gap = np.where(upper > lower, upper - lower, 1.0)
    step = np.abs(gap * scale) if scale_aware else np.ones_like(gap)
    with torch.no_grad():
        part.v.copy_(torch.linspace(-4, 4, x.numel()).reshape(x.shape) * torch.from_numpy(step))
    found = part(x)
    (found * upstream).sum().backward()
    z = part.v.detach().double().numpy() / step
    sigmoid = 1 / (1 + np.exp(-z))
    raw = sigmoid * 1.2 - 0.1
    h = np.clip(raw, 0, 1)
    np.testing.assert_allclose(found.detach().numpy(), scale * (lower + h * (upper - lower)), rtol=2e-6, atol=2e-6)
    alive = (raw > 0) & (raw < 1)
    slope = alive * sigmoid * (1 - sigmoid) * 1.2 * (upper - lower) * scale / step
    assert part.v.grad is not None and 0.5 < alive.mean() < 0.95
    np.testing.assert_allclose(part.v.grad.numpy(), upstream.numpy() * slope, rtol=2e-5, atol=2e-6)
    stored = part.settle(x)
    assert isinstance(stored, BlockQTensor)
    hard = scale * np.where(part.v.detach().numpy() >= 0, upper, lower)
    np.testing.assert_allclose(stored.dequantize().numpy(), hard, rtol=2e-6, atol=1e-9)


def test_scale_aware_gradients_carry_no_step() -> None:
    """FP4DiT's check 2: weights and scales times 2^k, the same gradient; the plain form's grows with 2^k."""
    x = torch.randn(4, 32)
    gradients: dict[bool, list[Tensor]] = {True: [], False: []}
    for aware, found in gradients.items():
        for k in (-6, 0, 6):
            part = learned("float4_e2m1fn group=8", x * 2.0**k, scale_aware=aware)
            part(x * 2.0**k).sum().backward()
            assert part.v.grad is not None
            found.append(part.v.grad)
    torch.testing.assert_close(gradients[True][0], gradients[True][2], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradients[False][0] * 2.0**12, gradients[False][2], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("line", LINES)
def test_any_v_gives_a_neighbour(line: str) -> None:
    """FP4DiT's check 3: the settled weight is the lower or the upper neighbour, and never beyond the range."""
    x = weight()
    part = learned(line, x)
    lower, upper, scale = by_numpy(x, line)
    with torch.no_grad():
        part.v.copy_(torch.randn(x.shape) * 3)
    found = part.eval()(x).double().numpy()
    low, high = np.abs(found - lower * scale), np.abs(found - upper * scale)
    assert np.minimum(low, high).max() <= 1e-6 * np.abs(found).max()
    assert 0.3 < (high < low).mean() < 0.7


def test_penalty() -> None:
    """lambda sum(1 - |2h - 1|^beta), beta 20 to 2 after the warm-up; 0 where all is decided."""
    x = torch.randn(4, 32)
    part = learned("int4 channel", x, strength=0.03)
    assert part.penalty(0.19) == 0
    h = part.h().detach().double()
    for t, beta in ((0.2, 20.0), (0.6, 11.0), (1.0, 2.0)):
        expected = 0.03 * (1 - (2 * h - 1).abs() ** beta).sum()
        torch.testing.assert_close(part.penalty(t).double(), expected, rtol=1e-5, atol=0)
    part.penalty(1.0).backward()  # type: ignore[no-untyped-call]
    assert part.v.grad is not None and part.v.grad.isfinite().all() and (part.v.grad != 0).any()
    with torch.no_grad():
        part.v.copy_(torch.where(part.v >= 0, 9.0, -9.0))
    assert part.penalty(1.0) == 0
    assert torch.equal(part(x).detach(), part.eval()(x))


def test_the_penalty_decides() -> None:
    """Annealed to the end, 95 % of h are within 0.01 of 0 or 1, and the layer's output is nearer than RTN's."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(8, 32, generator=generator)
    inputs = torch.randn(256, 32, generator=generator) @ (
        torch.eye(32) + 0.5 * torch.randn(32, 32, generator=generator)
    )
    for line, aware in (("int3 channel", False), ("float4_e2m1fn channel", True)):
        part = learned(line, w, scale_aware=aware, strength=0.3)
        optimizer = torch.optim.Adam(part.parameters(), lr=0.05)
        steps = 600
        for step in range(steps):
            optimizer.zero_grad()
            error = (inputs @ (part(w) - w).T).square().mean()
            loss: Tensor = error + part.penalty(step / steps)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        h = part.h().detach()
        assert (torch.minimum(h, 1 - h) < 0.01).float().mean() >= 0.95
        nearest = (inputs @ (Quantizer(line).fake_quantize(w) - w).T).square().mean()
        assert (inputs @ (part.eval()(w) - w).T).square().mean() < 0.8 * nearest


def test_ties_begin_as_the_rounding_says() -> None:
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 7.0]])
    for rounding in ("nearest-even", "half-away", "half-down", "half-up", "toward-zero"):
        quantizer = Quantizer("int4 channel", rounding=rounding)
        assert torch.equal(make_part("adaround", {}).make(quantizer, x).eval()(x), quantizer.fake_quantize(x))
    for line in ("nf4", "fp4_bnb"):  # published thresholds beside the exact middle, and the numbers next to them
        at = torch.from_numpy(np.array(get_format(line).thresholds("native")))
        row = torch.cat([at, at.nextafter(at - 1), at.nextafter(at + 1), torch.tensor([get_format(line).absmax])])
        quantizer = Quantizer(f"{line} channel rounding=native")
        found = make_part("adaround", {}).make(quantizer, row[None]).eval()(row[None])
        assert torch.equal(found, quantizer.fake_quantize(row[None]))


def test_rectified_sigmoid() -> None:
    h = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(rectified(logits_of(h)), h, rtol=0, atol=1e-12)
    assert rectified(torch.tensor(-math.log(11.0))) == pytest.approx(0, abs=1e-7)
    assert rectified(torch.tensor([-3.0, 3.0])).tolist() == [0, 1]
    assert [annealed(t, 20, 2, 0.0) for t in (0, 0.5, 1)] == [20, 11, 2]


def test_refusals() -> None:
    with pytest.raises(SchemeError, match=r"adaround.*floor"):
        make_part("adaround", {}).check(Quantizer("float8_e4m3fn tensor floor=normal"))
    for options in ({"warmup": 1.0}, {"beta_end": 30.0}, {"strength": -1.0}):
        with pytest.raises(SchemeError, match="adaround: warmup"):
            make_part("adaround", options)


@pytest.mark.parametrize("warmup", [0.0, 0.25])
def test_the_penalty_at_a_progress_that_is_a_tensor(warmup: float) -> None:
    """For steps that a GPU replays: the same numbers and gradients, without a decision on the processor."""
    deciding = Deciding(warmup=warmup)
    for t in (0.0, 0.1, 0.25, 0.5, 0.9, 1.0):
        found = []
        for progress in (t, torch.tensor(t)):
            h = torch.linspace(0.01, 0.99, 40).requires_grad_()
            term = deciding.term(h, progress)
            torch.autograd.backward(term + 0 * h.sum())
            found.append((term.detach(), h.grad))
        torch.testing.assert_close(found[0], found[1])
        assert (float(found[0][0]) > 0) == (t >= warmup)
