"""Rules that torch has not: Lion, LAMB, LARS against bitsandbytes; LAMB's ratio and Factor against their formulas."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nybble.optim.factor import Factor
from nybble.optim.lamb import LAMB
from nybble.optim.lars import LARS
from nybble.optim.lion import Lion
from nybble.optim.muon import MuonOptions, orthogonal

with warnings.catch_warnings():  # what it looks for at import is none of ours
    warnings.simplefilter("ignore")
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="the oracle: pip install bitsandbytes")
    peers = bitsandbytes.optim


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def gradient(shape: tuple[int, ...], step: int, size: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(step)) * size


LARS_OPTIONS = {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1}


@pytest.mark.parametrize(
    ("ours", "theirs", "options", "ulps"),
    [
        (Lion, peers.Lion32bit, {"lr": 1e-2, "weight_decay": 0.1}, 0),
        (LAMB, peers.LAMB32bit, {"lr": 0.1, "weight_decay": 0.1, "max_unorm": 0.0}, 0),
        (LAMB, peers.LAMB32bit, {"lr": 0.1, "weight_decay": 0.1}, 20),
        (LARS, peers.PytorchLARS, LARS_OPTIONS, 0),
        (LARS, peers.LARS32bit, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}, 20),
        (LARS, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "max_unorm": 0.0}, 0),
    ],
)
def test_peers_bit_for_bit(ours: Callable[..., Any], theirs: Any, options: dict[str, Any], ulps: int) -> None:
    """20 steps from the same start, with norms on both sides of their bound.

    Where theirs multiply by a reciprocal, an ulp of the largest weight for each step.
    """
    start = [gradient((40, 30), 90), gradient((500,), 91, 100.0)]
    ends = []
    for kind in (ours, theirs):
        params = [nn.Parameter(x.clone()) for x in start]
        told = options if kind is not torch.optim.SGD else {k: x for k, x in options.items() if k != "max_unorm"}
        optimizer = kind(params, **told, **({"state": None} if kind is ours else {}))
        for step in range(20):
            for p in params:
                p.grad = gradient(tuple(p.shape), step, 0.03)
            optimizer.step()
        ends.append(params)
    assert not torch.equal(ends[0][0], start[0])
    for a, b in zip(*ends, strict=True):
        assert (a - b).abs().max() <= ulps * 2.0**-23 * b.abs().max()


@pytest.mark.parametrize("mode", [{}, {"bias_correction": False}, {"adam_w_mode": False}])
def test_lamb_as_published(mode: dict[str, Any]) -> None:
    """Algorithm 2 in float64 for 10 steps; float32's errors stay below 64 units of its last place."""
    p = nn.Parameter(gradient((20, 30), 5))
    optimizer = LAMB([p], lr=0.05, weight_decay=0.1, max_unorm=None, state=None, **mode)
    x, m, v = p.detach().double(), torch.zeros(20, 30).double(), torch.zeros(20, 30).double()
    for step in range(1, 11):
        p.grad = gradient((20, 30), step)
        g = p.grad.double() + (0.1 * x if mode.get("adam_w_mode") is False else 0)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        c = (1.0, 1.0) if mode.get("bias_correction") is False else (1 - 0.9**step, 1 - 0.999**step)
        u = m / c[0] / ((v / c[1]).sqrt() + 1e-8) + (0 if mode.get("adam_w_mode") is False else 0.1 * x)
        x = x - 0.05 * x.norm() / u.norm() * u
        optimizer.step()
    assert (p.double() - x).abs().max() < 64 * 2.0**-24 * x.abs().max()


def test_lamb_of_zeros() -> None:
    """The published ratio is 1 where there is no weight; nothing moves where there is no direction."""
    p, still = nn.Parameter(torch.zeros(30)), nn.Parameter(torch.ones(30))
    optimizer = LAMB([p, still], lr=0.1, max_unorm=None)
    p.grad, still.grad = torch.ones(30), torch.zeros(30)
    optimizer.step()
    assert torch.allclose(p, torch.full((30,), -0.1)) and torch.equal(still, torch.ones(30))


def test_factor_by_its_formula() -> None:
    """Means of rows and columns in float64; of a rank-1 square it is AdamW."""
    p = nn.Parameter(gradient((3, 20, 30), 5))
    optimizer = Factor([p], lr=0.05, weight_decay=0.1, state=None)
    x, m = p.detach().double(), torch.zeros_like(p).double()
    rows, columns = torch.zeros(3, 20, 1).double(), torch.zeros(3, 1, 30).double()
    for step in range(1, 11):
        p.grad = gradient((3, 20, 30), step)
        g = p.grad.double()
        m = 0.9 * m + 0.1 * g
        rows = 0.999 * rows + 0.001 * (g**2).mean(-1, keepdim=True)
        columns = 0.999 * columns + 0.001 * (g**2).mean(-2, keepdim=True)
        v = rows * columns / rows.mean(-2, keepdim=True) / (1 - 0.999**step)
        x = x * (1 - 0.05 * 0.1) - 0.05 * (m / (1 - 0.9**step)) / (v.sqrt() + 1e-8)
        optimizer.step()
    assert (p.double() - x).abs().max() < 64 * 2.0**-24 * x.abs().max()

    a, b = nn.Parameter(torch.ones(8, 9)), nn.Parameter(torch.ones(8, 9))
    outer = torch.linspace(0.1, 2, 8)[:, None] * torch.linspace(-3, 1, 9)
    one, other = Factor([a], lr=0.1), torch.optim.AdamW([b], lr=0.1)
    for _ in range(5):
        a.grad, b.grad = outer.clone(), outer.clone()
        one.step()
        other.step()
    assert torch.allclose(a, b, rtol=1e-5)


def test_factor_of_nothing() -> None:
    """No gradient at all, or none in a row: no NaN, and no move."""
    p = nn.Parameter(torch.ones(64, 80))
    optimizer = Factor([p], weight_decay=0.0)
    for step in range(3):
        p.grad = torch.zeros(64, 80)
        p.grad[5:, 3:] = gradient((59, 77), step) if step else 0.0
        optimizer.step()
        assert p.isfinite().all() and (p[:5] == 1).all() and (p[:, :3] == 1).all()
    assert (p[5:, 3:] != 1).all()


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (64, 64)])
def test_orthogonal(shape: tuple[int, int]) -> None:
    """Singular vectors stay and singular values come to 0.7 .. 1.2 (bfloat16's product adds 0.02 at these sizes)."""
    x = gradient(shape, 3)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    x = u * s.clamp(min=s[0] / 50) @ vh
    y = orthogonal(x, MuonOptions()).float()
    inside = u.T @ y @ vh.T
    assert inside.diag().min() > 0.65 and inside.diag().max() < 1.25
    assert (inside - inside.diag().diag()).abs().max() < 0.05
    assert torch.equal(orthogonal(x * 2.0**20, MuonOptions()), y.bfloat16())  # scales don't matter
