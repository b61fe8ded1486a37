"""LoRA-Rounding: its equations in float64, what it counts, its start, and that a few numbers decide for all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from nybble.core.errors import SchemeError
from nybble.learned import make_part
from nybble.learned.lora_rounding import LowRankUpOrDown
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer


def learned(line: str, x: Tensor, **options: object) -> LowRankUpOrDown:
    found = make_part("lora-rounding", options).make(Quantizer(line), x)
    assert isinstance(found, LowRankUpOrDown)
    return found.train()


def test_begins_at_zero_with_few_parameters() -> None:
    """CBQ's check 2: (d + k) r numbers; with the paper's start V is 0 and h one half."""
    x = torch.randn(12, 40)
    part = learned("int3 channel", x, rank=3, start="half")
    assert sum(p.numel() for p in part.groups()["rounding"]) == (12 + 40) * 3
    assert not part.product().any() and float(part.a1.detach().std()) == pytest.approx(1, abs=0.3)
    scale = part.held.get_parameter("scale").detach()
    lower = (x / scale).floor().clamp(-3, 3)
    upper = ((x / scale).floor() + 1).clamp(-3, 3)
    torch.testing.assert_close(part(x).detach(), scale * (lower + upper) / 2, rtol=1e-5, atol=1e-6)
    assert learned("int3 channel", torch.randn(2, 40)).a1.shape == (2, 2)
    state = torch.get_rng_state()
    learned("int3 channel", x)
    assert torch.equal(torch.get_rng_state(), state)


def test_equations() -> None:
    """Value, and gradients of A1, A2 and s, with any of them; floor passes straight through to s."""
    x, upstream = torch.randn(6, 16), torch.randn(6, 16)
    part = learned("int3 channel", x, rank=2, start="half")
    scale = part.held.get_parameter("scale")
    with torch.no_grad():
        part.a2.copy_(torch.randn(2, 16))
        scale.mul_(0.7)
    found = part(x)
    (found * upstream).sum().backward()
    w, s = x.double().numpy(), scale.detach().double().numpy()
    a1, a2, out = (t.detach().double().numpy() for t in (part.a1, part.a2, upstream))
    sigmoid = 1 / (1 + np.exp(-(a1 @ a2)))
    h, y = np.clip(1.2 * sigmoid - 0.1, 0, 1), w / s
    lower, upper = np.clip(np.floor(y), -3, 3), np.clip(np.floor(y) + 1, -3, 3)
    value = lower + h * (upper - lower)
    np.testing.assert_allclose(found.detach().numpy(), s * value, rtol=1e-5, atol=1e-6)
    slope = 1.2 * sigmoid * (1 - sigmoid) * ((1.2 * sigmoid - 0.1 > 0) & (1.2 * sigmoid - 0.1 < 1))
    to_v = out * s * (upper - lower) * slope
    inside = (y >= -3) & (y <= 3)
    to_s = (out * (value - inside * y)).sum(1, keepdims=True)
    assert part.a1.grad is not None and part.a2.grad is not None and scale.grad is not None
    np.testing.assert_allclose(part.a1.grad.numpy(), to_v @ a2.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(part.a2.grad.numpy(), a1.T @ to_v, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scale.grad.numpy(), to_s, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("start", ["half", "nearest"])
def test_trained_it_is_a_neighbour_of_every_weight_and_better_than_nearest(start: str) -> None:
    """CBQ's check 3: on its own start soft and hard agree once the penalty has decided; on ours they always do."""
    generator = torch.Generator().manual_seed(0)
    x, mixing = torch.randn(16, 64, generator=generator), torch.randn(8, 64, generator=generator)
    noise = [0.2 * torch.randn(256, 64, generator=generator) for _ in range(2)]
    seen, unseen = (torch.randn(256, 8, generator=generator) @ mixing + each for each in noise)
    nearest = (unseen @ (Quantizer("int3 channel").fake_quantize(x) - x).T).square().mean()
    part = learned("int3 channel", x, rank=8, start=start, **({"strength": 0.1} if start == "half" else {}))
    groups = part.groups()
    optimizer = torch.optim.Adam([{"params": groups["rounding"], "lr": 0.05}, {"params": groups["scales"], "lr": 1e-3}])
    for step in range(200):
        optimizer.zero_grad()
        loss: Tensor = (seen @ (part(x) - x).T).square().mean() + part.penalty(step / 200)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    packed = part.settle(x)
    assert isinstance(packed, BlockQTensor)
    scale, hard = torch.as_tensor(packed.params.scale), packed.dequantize()
    codes, floor = (hard / scale).round(), (x / scale).floor()
    up = codes - floor
    assert ((up == 0) | (up == 1) | (codes.abs() == 3)).all() and 0.2 < float((up == 1).float().mean()) < 0.8
    assert (unseen @ (hard - x).T).square().mean() < 0.8 * nearest
    assert (part(x).detach() - hard).norm() / hard.norm() < (0.1 if start == "half" else 1e-6)
    assert not torch.equal(scale, torch.as_tensor(Quantizer("int3 channel").fit(x).scale))


def test_a_scale_that_learns_takes_the_nearest_roundings_with_it() -> None:
    """w / s past a whole number, or past a half: still the nearest value, in training and once settled."""
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    part = learned("int3 channel", x)
    scale = part.held.get_parameter("scale")
    with torch.no_grad():
        scale.mul_(0.9)
    wanted = (x / scale.detach()).round().clamp(-3, 3) * scale.detach()
    torch.testing.assert_close(part(x).detach(), wanted)
    torch.testing.assert_close(part.settle(x).dequantize(), wanted)
    part(x).square().sum().backward()
    assert scale.grad is not None and part.a2.grad is not None and part.a2.grad.any()
    y = (x / scale).detach()
    inside = (y.abs() <= 3).float()
    to_s = (2 * wanted * (wanted / scale.detach() - inside * y)).sum(1, keepdim=True)  # LSQ's
    torch.testing.assert_close(scale.grad, to_s, rtol=1e-4, atol=1e-4)


def test_equations_of_ours() -> None:
    """V = fraction's logit + A1 A2: which weights are up, and what moves A1 and A2, in float64."""
    x, upstream = torch.randn(6, 16), torch.randn(6, 16)
    part = learned("int3 channel", x, rank=2)
    with torch.no_grad():
        part.a2.copy_(torch.randn(2, 16))
        part.held.get_parameter("scale").mul_(0.7)  # so that no w / s is an end of the range but for its last bit
    found = part(x)
    (found * upstream).sum().backward()
    w, s = x.double().numpy(), part.held.get_parameter("scale").detach().double().numpy()
    a1, a2, out = (t.detach().double().numpy() for t in (part.a1, part.a2, upstream))
    y = w / s
    lower, upper = np.clip(np.floor(y), -3, 3), np.clip(np.floor(y) + 1, -3, 3)
    fraction = np.where(upper > lower, y - lower, 0.0)
    v = -np.log(1.2 / (fraction + 0.1) - 1) + a1 @ a2
    np.testing.assert_allclose(found.detach().numpy(), s * np.where(v >= 0, upper, lower), rtol=1e-5, atol=1e-6)
    sigmoid = 1 / (1 + np.exp(-v))
    slope = 1.2 * sigmoid * (1 - sigmoid) * ((1.2 * sigmoid - 0.1 > 0) & (1.2 * sigmoid - 0.1 < 1))
    to_v = out * s * (upper - lower) * slope
    assert part.a1.grad is not None and part.a2.grad is not None
    np.testing.assert_allclose(part.a1.grad.numpy(), to_v @ a2.T, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(part.a2.grad.numpy(), a1.T @ to_v, rtol=1e-3, atol=1e-5)
    assert float(part.penalty(0.5)) == 0


def test_refusals() -> None:
    for options, said in (
        ({"rank": 0}, "rank=0"),
        ({"warmup": 1.0}, "warmup"),
        ({"beta_end": 30.0}, "beta_start"),
        ({"strength": 0.1}, "add start=half"),
    ):
        with pytest.raises(SchemeError, match=f"lora-rounding.*{said}"):
            make_part("lora-rounding", options)
    with pytest.raises(SchemeError, match=r"lora-rounding.*floor"):
        make_part("lora-rounding", {}).check(Quantizer("float8_e4m3fn tensor floor=normal"))
