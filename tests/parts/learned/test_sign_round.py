"""SignRound: its equations in float64, its bounds, and that signed gradients bring it below nearest rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from nybble.core.errors import SchemeError
from nybble.learned import make_part
from nybble.learned.sign_round import Shifted
from nybble.qtensor import dense
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer


def learned(line: str, x: Tensor, **options: object) -> Shifted:
    found = make_part("sign-round", options).make(Quantizer(line), x)
    assert isinstance(found, Shifted)
    return found.train()


def test_equations() -> None:
    """Asymmetric integers, as AutoRound has them: value, zero point, and the gradients of V, alpha and beta."""
    x, upstream = torch.randn(5, 24), torch.randn(5, 24)
    part = learned("int3 group=8 symmetric=false scale_format=float32", x)
    assert part.beta is not None
    with torch.no_grad():
        part.v.copy_(torch.rand(x.shape) - 0.5)
        part.alpha.uniform_(0.6, 0.9)
        part.beta.uniform_(0.6, 0.9)
    found = part(x)
    (found * upstream).sum().backward()
    w, out = x.double().numpy().reshape(15, 8), upstream.double().numpy().reshape(15, 8)
    alpha, beta = (p.detach().double().numpy().reshape(15, 1) for p in (part.alpha, part.beta))
    high, low = w.max(1, keepdims=True), w.min(1, keepdims=True)
    s = (alpha * high - beta * low) / 7
    zero = np.round(-4 - beta * low / s)  # codes of a signed format, -4 to 3
    q = np.round(w / s + part.v.detach().double().numpy().reshape(15, 8)) + zero
    inside = (q >= -4) & (q <= 3)
    value = (np.clip(q, -4, 3) - zero) * s
    np.testing.assert_allclose(found.detach().numpy().reshape(15, 8), value, rtol=2e-6, atol=1e-7)
    assert part.v.grad is not None and part.alpha.grad is not None and part.beta.grad is not None
    np.testing.assert_allclose(part.v.grad.numpy().reshape(15, 8), inside * s * out, rtol=2e-6, atol=1e-7)
    to_s = ((value / s - inside * w / s) * out).sum(1, keepdims=True)
    np.testing.assert_allclose(part.alpha.grad.numpy().reshape(15, 1), to_s * high / 7, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(part.beta.grad.numpy().reshape(15, 1), -to_s * low / 7, rtol=1e-4, atol=1e-5)
    assert not inside.all()


def test_on_a_float_grid_v_counts_steps_of_the_grid() -> None:
    """E2M1's steps are 0.5, 1 and 2 wide: half of one, up, decides like rounding up from the middle."""
    x = torch.tensor([[0.3, 1.3, 2.3, 4.1, 6.0, -0.3, -4.1, -6.0]])
    part = learned("float4_e2m1fn channel", x)
    assert part(x).tolist()[0] == [0.5, 1.5, 2, 4, 6, -0.5, -4, -6]
    with torch.no_grad():
        part.v.fill_(0.45)
    assert part(x).tolist()[0] == [0.5, 1.5, 3, 4, 6, 0.0, -3, -6]
    with torch.no_grad():
        part.v.fill_(-0.45)
    assert part(x).tolist()[0] == [0.0, 1.0, 2, 3, 6, -0.5, -4, -6]


def test_bounds_hold_what_is_used_and_nothing_is_stuck_there() -> None:
    x = torch.randn(4, 16)
    part = learned("int4 channel symmetric=false", x)
    assert part.beta is not None
    with torch.no_grad():
        for p, far, at in ((part.v, 3.0, 0.5), (part.alpha, 7.0, 1.0), (part.beta, -2.0, 0.5)):
            p.fill_(far)
            beyond = part.eval()(x)
            p.fill_(at)
            assert torch.equal(part(x), beyond)
            p.fill_(far)
    (part.train()(x) * torch.randn(x.shape)).sum().backward()
    assert all(p.grad is not None and p.grad.count_nonzero() for p in part.parameters())


def test_least_is_the_smallest_share_of_either_end() -> None:
    x = torch.randn(4, 16)
    for line in ("int4 channel symmetric=false", "int4 channel scale=mse"):
        part = learned(line, x, least=0.7)
        shares = [p for p in (part.alpha, part.beta) if p is not None]
        found = []
        for share in (0.1, 0.7, 0.75):
            with torch.no_grad():
                for p in shares:
                    p.fill_(share)
            found.append(part.eval()(x))
        assert torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])


@pytest.mark.parametrize("line", ["int2 group=16 symmetric=false", "nvfp4"])
def test_signed_steps_beat_nearest(line: str) -> None:
    """200 steps of 1/200, falling in a line, the best state kept, as in the paper's code; V never leaves its range."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 64, generator=generator)
    mixing = torch.randn(8, 64, generator=generator)  # a few directions carry most, as in a language model
    noise = [0.2 * torch.randn(512, 64, generator=generator) for _ in range(2)]
    seen, unseen = (torch.randn(512, 8, generator=generator) @ mixing + each for each in noise)
    part, steps = learned(line, x), 200
    best, state = torch.inf, part.state_dict()
    for step in range(steps):
        loss: Tensor = (seen @ (part(x) - x).T).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        if loss.item() < best:
            best, state = loss.item(), {name: value.clone() for name, value in part.state_dict().items()}
        for p in part.parameters():
            assert p.grad is not None
            p.data -= (1 - step / steps) / steps * p.grad.sign()
            p.grad = None
    assert 0.3 < part.v.abs().max() <= 0.5025
    part.load_state_dict(state)
    reached, nearest = part.eval()(x), Quantizer(line).fake_quantize(x)
    errors = [float((unseen @ (w - x).T).square().mean()) for w in (reached, nearest)]
    assert errors[0] < 0.7 * errors[1]
    packed = part.settle(x)
    assert isinstance(packed, BlockQTensor)
    ratio = dense(packed.params.scale) / dense(Quantizer(line).quantize(x).params.scale)  # type: ignore[arg-type]
    assert float(ratio.min()) < 1 and float(ratio.max()) <= 1 + 1 / 16  # half a step of E4M3 scales


def test_refusals() -> None:
    for options in ({"least": 1.0}, {"least": -0.1}):
        with pytest.raises(SchemeError, match="sign-round: least is a share"):
            make_part("sign-round", options)
    with pytest.raises(SchemeError, match=r"sign-round.*floor"):
        make_part("sign-round", {}).check(Quantizer("float8_e4m3fn tensor floor=normal"))
