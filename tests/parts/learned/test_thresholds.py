"""Learned thresholds: N2UQ's forward by counting, its gradients against autograd and differences in float64."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import input_ids, tiny_model
from torch import Tensor

from nybble.core.errors import SchemeError
from nybble.learned import ACTIVATIONS, make_part
from nybble.learned.thresholds import LearnedThresholds, mean_level
from nybble.quantizer import Quantizer
from nybble.training.prepare import prepare


def made(line: str = "uint2 tensor static", seed: int | None = 0) -> LearnedThresholds:
    """A part with edges, gain and scale of its own; none moved without a seed."""
    found = make_part("thresholds", {}).make(Quantizer(line), x(), side=ACTIVATIONS)
    assert isinstance(found, LearnedThresholds)
    if seed is not None:
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            found.widths.copy_(0.3 + torch.rand(found.widths.shape, generator=draw))
            found.start.add_(0.37)
            found.gain.fill_(1.21)
            found.scale.mul_(0.83)
    return found.train()


def x(count: int = 4096) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(1)).reshape(4, -1) * 1.7 + 0.8


def edges(part: LearnedThresholds) -> Tensor:
    """float64 d_0 ... d_K, in units of u."""
    return torch.cat([torch.zeros(1), part.widths.detach()]).double().cumsum(0) + part.start.double()


@pytest.mark.parametrize(
    "line", ["uint1 tensor static", "uint2 tensor static", "uint4 tensor static", "int3 tensor static"]
)
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_levels_are_counted(line: str, seed: int | None) -> None:
    """Check 1: how many of the middles are passed, monotone, every level there; alike widths are round and clip."""
    part = made(line, seed)
    given = x().sort().values
    d, fmt = edges(part), Quantizer(line).format
    u = part.gain.double() * given.double() / part.get_buffer("unit").double()
    middles = (d[1:] + d[:-1]) / 2
    count = (u[..., None] >= middles).sum(-1)
    found = part(given)
    clear = (u[..., None] - middles).abs().amin(-1) > 1e-5
    levels = found.detach().double() / part.scale.double()
    assert torch.equal(levels.round()[clear], (count + fmt.min)[clear]) and (levels - levels.round()).abs().max() < 1e-6
    assert len(found.unique()) == len(fmt.grid) and bool((found.diff() >= 0).all())
    assert torch.equal(part.eval()(given), found)
    if seed is None:
        plain = (given.double() / part.scale.double()).round().clamp(fmt.min, fmt.max)
        assert torch.equal(levels.round(), plain)


def test_at_a_threshold_the_upper_level() -> None:
    part = made(seed=None)
    with torch.no_grad():
        part.scale.fill_(1.0)
        part.get_buffer("unit").fill_(1.0)
    assert part(torch.tensor([0.5, 1.5, 2.5])).tolist() == [1, 2, 3]
    assert part(torch.tensor([0.5, 1.5, 2.5]).nextafter(torch.zeros(()))).tolist() == [0, 1, 2]


@pytest.mark.parametrize("steps", [1, 3, 15])
def test_the_gradient_is_that_of_the_mean(steps: int) -> None:
    """Check 2: autograd of the sum of clips to 1e-12, differences away from edges, 0 outside; all in float64."""
    draw = torch.Generator().manual_seed(steps)
    widths = 0.2 + torch.rand(steps, generator=draw, dtype=torch.float64)
    start = torch.tensor([-0.4], dtype=torch.float64)
    lower = torch.cat([start, start + widths.cumsum(0)])
    u = torch.rand(3000, generator=draw, dtype=torch.float64) * (widths.sum() + 2) - 1.4
    u = u[(u[:, None] - lower).abs().amin(1) > 1e-4]
    upstream = torch.randn(u.shape, generator=draw, dtype=torch.float64)

    def clips(u: Tensor, start: Tensor, widths: Tensor) -> Tensor:
        low = start + widths.cumsum(0) - widths
        return ((u[:, None] - low) / widths).clamp(0, 1).sum(1)

    given = [t.clone().requires_grad_() for t in (u, start, widths)]
    found, want = mean_level(*given), clips(*given)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-12)
    ours, theirs = (torch.autograd.grad(y, given, upstream) for y in (found, want))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    outside = (u < lower[0]) | (u >= lower[-1])
    assert outside.any() and ours[0][outside].count_nonzero() == 0
    for i in range(steps):
        moved = torch.zeros_like(widths)
        moved[i] = 1e-6
        slope = (clips(u, start, widths + moved) - clips(u, start, widths - moved)) / 2e-6
        assert ours[2][i].item() == pytest.approx((slope * upstream).sum().item(), rel=1e-6, abs=1e-6)
    at_edges = lower.clone().requires_grad_()
    torch.autograd.backward(mean_level(at_edges, start, widths).sum())
    assert at_edges.grad is not None and torch.equal(at_edges.grad, torch.cat([1 / widths, torch.zeros(1)]))


def test_the_mean_is_that_of_stochastic_rounding() -> None:
    """Check 3: within 4.5 standard errors of 20,000 draws."""
    widths, start = torch.tensor([0.4, 1.3, 0.7], dtype=torch.float64), torch.tensor([0.2], dtype=torch.float64)
    u = torch.tensor([0.3, 0.55, 1.1, 1.8, 2.4], dtype=torch.float64)
    low = start + widths.cumsum(0) - widths
    at = (u[:, None] >= low).sum(1) - 1
    up = (u - low[at]) / widths[at]
    draws = (at[:, None] + (torch.rand(5, 20_000, dtype=torch.float64) < up[:, None])).double().mean(1)
    error = (up * (1 - up) / 20_000).sqrt()
    assert bool(((draws - mean_level(u, start, widths)).abs() < 4.5 * error).all())


def test_what_reaches_the_parameters() -> None:
    """Of y = scale x_q(gain x / unit): the count to the scale, and the rest times the scale, over all elements."""
    part, given = made(), x().requires_grad_()
    upstream = torch.randn(given.shape, generator=torch.Generator().manual_seed(5))
    part(given).backward(upstream)
    scale, gain, unit = (t.detach().double() for t in (part.scale, part.gain, part.get_buffer("unit")))
    u = (gain * given.detach().double() / unit).requires_grad_()
    start, widths = (t.detach().double().requires_grad_() for t in (part.start, part.widths))
    mean = mean_level(u, start, widths)
    to_u, to_start, to_widths = torch.autograd.grad(mean, (u, start, widths), scale * upstream.double())
    count = (part(given).detach().double() / scale).round()
    want = {
        "start": to_start, "widths": to_widths, "gain": (to_u * given.detach().double() / unit).sum().reshape(1),
        "scale": (upstream.double() * count).sum().reshape(1),
    }  # fmt: skip
    for name, value in want.items():
        grad = part.get_parameter(name).grad
        assert grad is not None
        torch.testing.assert_close(grad.double(), value, rtol=2e-4, atol=2e-3)
    assert given.grad is not None
    torch.testing.assert_close(given.grad.double(), to_u * gain / unit, rtol=2e-5, atol=1e-5)


def test_a_width_at_the_floor_recovers() -> None:
    part = made()
    with torch.no_grad():
        part.widths[1] = -0.5
    found = part(x().requires_grad_())
    found.sum().backward()
    assert part.widths.grad is not None and part.widths.grad[1] != 0
    stored = part.fixed().thresholds
    assert stored is not None and bool((stored.diff() >= 0).all())


def test_refusals() -> None:
    for line, says in (
        ("uint2 token", "measures those of each tensor.*tensor static"),
        ("uint8 tensor static", "15 thresholds or fewer.*uint1 to uint4"),
        ("float4_e2m1fn tensor static", "levels a step apart"),
        ("uint4 tensor static symmetric=false", "leave symmetric=false"),
    ):
        with pytest.raises(SchemeError, match=f"thresholds.*{says}"):
            make_part("thresholds", {}).check(Quantizer(line), ACTIVATIONS)
    for floor in (0.0, -1.0):
        with pytest.raises(SchemeError, match=rf"floor={floor:g}.*above 0"):
            make_part("thresholds", {"floor": floor})
    with pytest.raises(SchemeError, match="thresholds can't begin at a scale of nan"):
        make_part("thresholds", {}).make(Quantizer("uint2 tensor static"), x() * torch.nan, side=ACTIVATIONS)
    with pytest.raises(SchemeError, match="thresholds learns activations, not weights"):
        make_part("thresholds", {}).check(Quantizer("int4 channel"))


def test_a_cache_keeps_scales_alone() -> None:
    """Elastic's threshold would be forgotten there, too; without one it trains."""
    ids = input_ids()
    for part, line in (("thresholds", "int3_full tensor static"), ("elastic", "int4 tensor static")):
        with pytest.raises(SchemeError, match="a cache keeps codes and scales, and what learns keys learns thresholds"):
            prepare(tiny_model(), {"kv": line}, {"kv": part}, run=lambda model: model(input_ids=ids))
    model = tiny_model()
    plain = make_part("elastic", {"threshold": "none"})
    prepare(model, {"kv": "int4 tensor static"}, {"kv": plain}, run=lambda model: model(input_ids=ids))
