"""AdamW in few bits against bitsandbytes' AdamW8bit, against its 32-bit self, and on a small problem."""

from __future__ import annotations

import math
import statistics
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nybble.optim.adamw import PART, AdamW
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer

with warnings.catch_warnings():  # what it looks for at import is none of ours
    warnings.simplefilter("ignore")
    bitsandbytes = pytest.importorskip(
        "bitsandbytes", reason="the oracle of 8-bit optimizers: pip install bitsandbytes"
    )
    cpu_ops = pytest.importorskip("bitsandbytes.backends.cpu.ops")

SIZES = ((70, 64), (5000,))  # 17.5 and 19.5 blocks of 256
BLOCK = 256


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def gradient(shape: tuple[int, ...], step: int) -> Tensor:
    """Never zero, with rows of several magnitudes."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator) ** 4 + 1e-9


def held(optimizer: torch.optim.Optimizer, p: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Codes and scales."""
    kept = optimizer.state[p][name]
    assert isinstance(kept, BlockQTensor) and isinstance(kept.params.scale, Tensor)
    return kept.codes, kept.params.scale


# ------------------------------------------------------------------------------------------------------ bitsandbytes
class SameRule(AdamW):
    """The update as bitsandbytes writes it off the GPU: ``b1 m + (1 - b1) g`` differs from a lerp in the last bit."""

    @staticmethod
    def update(
        p: Tensor, grad: Tensor, states: dict[str, Tensor], step: int, options: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        beta1, beta2 = options.betas
        m = states["exp_avg"].mul(beta1).add_(grad, alpha=1.0 - beta1)
        v = states["exp_avg_sq"].mul(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        denominator = (v.sqrt() / math.sqrt(1.0 - beta2**step)).add_(options.eps)
        p = p.mul(1.0 - options.lr * options.weight_decay)
        return p.addcdiv(m, denominator, value=-options.lr / (1.0 - beta1**step)), {"exp_avg": m, "exp_avg_sq": v}


def pair(kind: type[AdamW], dtype: torch.dtype = torch.float32) -> tuple[Any, list[nn.Parameter], Any, Any]:
    """Ours and theirs over the same parameters."""
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
    start = [torch.randn(shape).to(dtype) for shape in SIZES]
    ours, theirs = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    return kind(ours, **options), ours, bitsandbytes.optim.AdamW8bit(theirs, **options), theirs


def nearest_codes(x: Tensor, table: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The CUDA kernel's codes: x times the reciprocal of its block's maximum against float32 midpoints."""
    flat = nn.functional.pad(x.flatten(), (0, -x.numel() % block)).view(-1, block)
    top = flat.abs().amax(1)
    y = (flat * (1 / top)[:, None]).flatten()[: x.numel()]
    middle = (table[1:] + table[:-1]) * 0.5
    below, tie = (y[:, None] > middle).sum(1), (y[:, None] == middle).any(1)
    return (below + (tie & (below % 2 == 1))).to(torch.uint8), top


def their_quantize(x: Tensor, code: Tensor, absmax_out: Tensor, out: Tensor, block: int) -> None:
    codes, top = nearest_codes(x, code, block)
    out.copy_(codes.view(out.shape))
    absmax_out.copy_(top)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitsandbytes_for_many_steps(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """The same parameters, codes and scales after each of 20 steps, bit for bit.

    Their CPU path rounds by a table of 65,536 cells; here it rounds as their CUDA kernel does.
    """
    monkeypatch.setattr(cpu_ops, "_quant_blockwise_fp32_direct", their_quantize)
    one, ours, other, theirs = pair(SameRule, dtype)
    for step in range(20):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = gradient(tuple(p.shape), step).to(dtype)
            q.grad = p.grad.clone()
        one.step()
        other.step()
        for p, q in zip(ours, theirs, strict=True):
            assert torch.equal(p, q)
            for name, i in (("exp_avg", "1"), ("exp_avg_sq", "2")):
                codes, scale = held(one, p, name)
                assert torch.equal(codes, other.state[q][f"state{i}"].flatten())
                assert torch.equal(scale, other.state[q][f"absmax{i}"])


@pytest.mark.parametrize(("kind", "ulps"), [(SameRule, 0), (AdamW, 8)])
def test_bitsandbytes_as_it_is(monkeypatch: pytest.MonkeyPatch, kind: type[AdamW], ulps: int) -> None:
    """Each step from our codes: the same scales and parameters, and codes wherever a cell of their table decides.

    AdamW's lerp and torch's order of division round m and p elsewhere, by a few units in the last place.
    """
    fresh: list[Tensor] = []
    quantize = cpu_ops._quant_blockwise_fp32_direct

    def listen(x: Tensor, *rest: Any) -> None:
        fresh.append(x.clone())
        quantize(x, *rest)

    monkeypatch.setattr(cpu_ops, "_quant_blockwise_fp32_direct", listen)
    one, ours, other, theirs = pair(kind)
    for step in range(6):
        fresh.clear()
        for p, q in zip(ours, theirs, strict=True):
            p.grad = gradient(tuple(p.shape), step)
            q.grad = p.grad.clone()
            for name, i in (("exp_avg", "1"), ("exp_avg_sq", "2")) if step else ():
                codes, scale = held(one, p, name)
                other.state[q][f"state{i}"].copy_(codes.view(p.shape))
                other.state[q][f"absmax{i}"].copy_(scale)
            q.data.copy_(p)
        one.step()
        other.step()
        moments = iter(fresh)
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=ulps * 2.0**-24, atol=ulps * 2.0**-24)
            for name, i in (("exp_avg", "1"), ("exp_avg_sq", "2")):
                codes, scale = held(one, p, name)
                torch.testing.assert_close(scale, other.state[q][f"absmax{i}"], rtol=ulps * 2.0**-24, atol=0)
                y = next(moments).flatten() / scale.repeat_interleave(BLOCK)[: p.numel()]
                compare_cells(codes, other.state[q][f"state{i}"].flatten(), y, other.state[q][f"qmap{i}"])


def compare_cells(ours: Tensor, theirs: Tensor, y: Tensor, table: Tensor) -> None:
    """Equal codes of y in [-1, 1], but where y's cell of 65,536 (or the next) has a threshold; ours is nearer there."""
    undecided = (y[:, None] - (table[1:] + table[:-1]) / 2).abs().amin(1) < 2 / 65535
    assert 0 < undecided.float().mean() < 0.9
    assert torch.equal(ours[~undecided], theirs[~undecided])
    error = [(table[codes.long()] - y).abs() for codes in (ours, theirs)]
    assert (error[0] <= error[1] + 1e-6).all()


# ------------------------------------------------------------------------------------------------- its 32-bit self
def test_first_step_is_the_32_bit_step() -> None:
    """The update takes the fresh moments, not the rounded ones."""
    start = torch.randn(64, 128)
    ends = []
    for make in (AdamW, torch.optim.AdamW):
        p = nn.Parameter(start.clone())
        optimizer = make([p], lr=0.1)
        for step in range(2):
            p.grad = gradient((64, 128), step)
            optimizer.step()
            ends.append(p.detach().clone())
    assert torch.equal(ends[0], ends[2]) and not torch.equal(ends[0], start)
    assert not torch.equal(ends[1], ends[3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_parameters(dtype: torch.dtype) -> None:
    """float32 inside: torch's AdamW on a float32 copy, which is rounded to the parameter's dtype after each step."""
    start = torch.randn(40, 30).to(dtype)
    p, wide = nn.Parameter(start.clone()), nn.Parameter(start.float())
    one, other = AdamW([p], lr=1e-2, state=None), torch.optim.AdamW([wide], lr=1e-2)
    for step in range(10):
        p.grad = gradient((40, 30), step).to(dtype)
        wide.grad = p.grad.float()
        one.step()
        other.step()
        wide.data.copy_(wide.to(dtype).float())
        assert p.dtype == dtype and torch.equal(p.float(), wide)
    assert torch.equal(one.state[p]["exp_avg_sq"], other.state[wide]["exp_avg_sq"])


def test_rounding_of_the_states() -> None:
    """After a step from zero the states are the presets' rounding of (1 - b1) g and (1 - b2) g^2."""
    p = nn.Parameter(torch.zeros(64, 80))
    p.grad = gradient((64, 80), 0)
    optimizer = AdamW([p])
    optimizer.step()
    m, v = torch.zeros(64, 80).lerp(p.grad, 1 - 0.9), torch.zeros(64, 80).addcmul(p.grad, p.grad, value=1 - 0.999)
    for name, x, preset, bound in (
        ("exp_avg", m, "state8", 0.00703125),
        ("exp_avg_sq", v, "state8-unsigned", 0.003515625),
    ):
        kept = optimizer.state[p][name]
        assert torch.equal(kept.codes, Quantizer(preset).quantize(x).codes)
        top = x.view(-1, BLOCK).abs().amax(1, keepdim=True)
        error = (kept.dequantize() - x).view(-1, BLOCK).abs() / top  # the sheet's bounds: half the largest gap
        assert bound / 2 < error.max() <= bound + 2.0**-23


# ----------------------------------------------------------------------------------------------------- a small problem
def final_loss(order: int, **options: Any) -> float:
    """A student of two layers learns a teacher's outputs: 300 steps of 32 samples; loss on all 512 at the end."""
    draw = torch.Generator().manual_seed(7)
    x = torch.randn(512, 16, generator=draw)
    teacher = torch.randn(16, 8, generator=draw), torch.randn(8, 1, generator=draw)
    y = torch.tanh(x @ teacher[0]) @ teacher[1]
    w1 = nn.Parameter(torch.randn(16, 64, generator=draw) / 4)
    w2 = nn.Parameter(torch.randn(64, 1, generator=draw) / 8)
    optimizer = AdamW([w1, w2], lr=1e-2, min_size=0, **options)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, 300)
    batches = torch.Generator().manual_seed(order)

    def loss(rows: Tensor) -> Tensor:
        return (torch.tanh(x[rows] @ w1) @ w2 - y[rows]).square().mean()

    for _ in range(300):
        optimizer.zero_grad()
        torch.autograd.backward(loss(torch.randint(512, (32,), generator=batches)))
        optimizer.step()
        schedule.step()
    return float(loss(torch.arange(512)).detach())


def test_converges_as_32_bits_do() -> None:
    """8 bits cost less than another order of the samples does; a linear map for v, whose zero is coarse, far more.

    The ruler is the spread of the 32-bit loss over orders: a mean over six of them is known to spread / sqrt(6), a
    difference of two such means to spread * sqrt(2 / 6), and two of those (95 %) are 1.15 spreads.
    """
    orders = range(6)
    wide = [final_loss(order, state=None) for order in orders]
    allowed = 1.15 * statistics.stdev(wide)
    assert allowed < 0.05 * statistics.mean(wide)  # a few per cent
    narrow = [final_loss(order, state="state8") for order in orders]
    assert narrow != wide
    assert abs(statistics.mean(narrow) - statistics.mean(wide)) < allowed
    linear = {"exp_avg": "state8", "exp_avg_sq": "int8 flat=2048"}
    assert min(final_loss(order, state=linear) for order in orders[:2]) > statistics.mean(wide) + 3 * allowed


def test_zero_in_the_second_moment() -> None:
    """Li et al. 2023, section 4.1: where v is rounded to 0 the next update is far too large; ``linear4`` has no zero.

    Half the columns have gradients a hundred times smaller, so their v is 1e-4 of the others'. The nearest value of
    ``linear4`` is at least x / 1.5 (its first threshold is at 1.5 / 16), so the second update, the first one from a
    rounded v, grows by sqrt(1.5) at most.
    """
    updates = {}
    for line in (None, "linear4 rank1", "udynamic4 flat=128"):
        p = nn.Parameter(torch.zeros(64, 128))
        optimizer = AdamW([p], lr=1.0, weight_decay=0, state={"exp_avg": None, "exp_avg_sq": line})
        for step in range(2):
            before = p.detach().clone()
            p.grad = torch.randn(64, 128, generator=torch.Generator().manual_seed(step))
            p.grad[:, ::2] *= 1e-2
            optimizer.step()
        updates[line] = (p.detach() - before).abs()
    assert 1.1 < (updates["linear4 rank1"] / updates[None]).max() <= 1.5**0.5 * (1 + 1e-5)
    assert (updates["udynamic4 flat=128"] / updates[None]).max() > 10


def test_part() -> None:
    assert PART is AdamW
