"""4-bit optimizer states (Li et al. 2023): what the sheet says that a faithful implementation must show.

Numbers are the sheet's list. Its check 3 is in tests/parts/optim/test_presets.py, 4 and 6 in
tests/contracts/test_optimizers.py, 8 in tests/parts/optim/test_room.py.
"""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nybble.optim
from nybble.formats import get_format
from nybble.optim.adamw import AdamW
from nybble.qtensor import Factored
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer

RANK1 = Quantizer("state4-unsigned")
SIGNED4 = [
    *(-0.8875, -0.6625, -0.4375, -0.2125, -0.0775, -0.0325, -0.0055, 0),
    *(0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875, 1.0),
]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_maps() -> None:
    """1: 16 sorted values; no -1 in the signed one, no 0 in the linear one, 0.00325 the smallest of DE-0."""
    signed, linear, de0 = (get_format(name).values for name in ("dynamic4", "linear4", "udynamic4_de0"))
    assert np.allclose(signed, SIGNED4, rtol=3e-7, atol=0) and (np.diff(signed) > 0).all()
    assert linear.tolist() == [(i + 1) / 16 for i in range(16)]
    assert np.isclose(de0.min(), 0.00325, rtol=1e-6) and len(de0) == 16


def test_rank_one() -> None:
    """2: the smaller of row's and column's maximum; an outlier leaves all that is in neither its row nor its column.

    One scale for the whole tensor does not.
    """
    x = draw(48, 80).square()
    kept = RANK1.quantize(x)
    assert isinstance(kept, BlockQTensor)
    scale = torch.minimum(x.amax(1, keepdim=True), x.amax(0))
    assert isinstance(kept.params.scale, Factored)
    rows, columns = (factor for factor in kept.params.scale.factors if isinstance(factor, Tensor))
    assert torch.equal(torch.minimum(rows.view(-1, 1), columns.view(1, -1)), scale)
    assert (scale >= x).all() and rows.numel() == 48 and columns.numel() == 80

    quiet = (torch.arange(48) != 7)[:, None] & (torch.arange(80) != 11)
    lone = x.clone()
    lone[7, 11] = 1e4
    for line, kept_whole in (("linear4 rank1 rounding=half-down", True), ("linear4 tensor", False)):
        before, after = (Quantizer(line).quantize(y).dequantize() for y in (x, lone))
        assert torch.equal(before[quiet], after[quiet]) is kept_whole


def test_a_zero_row() -> None:
    """0 / 0 of a row that has seen no gradient is 0, in a parameter's first step as well (sheet, 8)."""
    x = draw(48, 80).square()
    x[3], x[:, 5] = 0, 0
    back = RANK1.quantize(x).dequantize()
    assert back.isfinite().all() and not back[3].any() and not back[:, 5].any()
    p = nn.Parameter(torch.ones(64, 80))
    optimizer = nybble.optim.AdamW4bit([p], weight_decay=0.0)
    p.grad = torch.zeros(64, 80)
    optimizer.step()
    assert torch.equal(p, torch.ones(64, 80))


def test_ties_go_down() -> None:
    """The official kernels keep the lower index at an exact midpoint."""
    middles = torch.tensor([*((2 * i + 3) / 32 for i in range(15)), 1.0])
    assert RANK1.quantize(torch.stack([middles, torch.ones(16)])).unpacked()[0].tolist() == [*range(15), 15]


# ------------------------------------------------------------------------------------------------- a small problem
DE_FOR_V: dict[str, Any] = {"exp_avg": "state4", "exp_avg_sq": "udynamic4 flat=128"}


def run(order: int, **options: Any) -> tuple[float, float]:
    """Loss at the end of 200 steps, and the largest single update; some inputs are 0, and so are their gradients."""
    seed = torch.Generator().manual_seed(3)
    x = torch.randn(512, 64, generator=seed) * (torch.rand(512, 64, generator=seed) < 0.3)
    x[:, ::7] = 0
    y = torch.tanh(x @ torch.randn(64, 16, generator=seed) / 4) @ torch.randn(16, 1, generator=seed)
    w1 = nn.Parameter(torch.randn(64, 128, generator=seed) / 8)
    w2 = nn.Parameter(torch.randn(128, 1, generator=seed) / 11)
    optimizer = AdamW([w1, w2], lr=3e-3, min_size=129, weight_decay=0.0, **options)
    batches, largest = torch.Generator().manual_seed(order), 0.0
    for _ in range(200):
        rows = torch.randint(512, (64,), generator=batches)
        optimizer.zero_grad()
        torch.autograd.backward((torch.tanh(x[rows] @ w1) @ w2 - y[rows]).square().mean())
        before = w1.detach().clone()
        optimizer.step()
        largest = max(largest, float((w1.detach() - before).abs().max()))
    return float((torch.tanh(x @ w1) @ w2 - y).square().mean().detach()), largest


def test_trains_as_32_bits_and_diverges_with_a_zero_in_v() -> None:
    """5: rank-1/linear within a few per cent; B128/DE for v makes updates many times larger, as its map has a zero."""
    wide, narrow, factor = [], [], []
    for order in range(3):
        wide.append(run(order, state=None))
        narrow.append(run(order, state="state4"))
        factor.append(run(order, state={"exp_avg": "state4", "exp_avg_sq": "udynamic4_de0 flat=128"}))
    mean = statistics.mean(loss for loss, _ in wide)
    assert abs(statistics.mean(loss for loss, _ in narrow) / mean - 1) < 0.05
    largest = max(update for _, update in wide)
    assert max(update for _, update in narrow) < 5 * largest
    assert run(0, state=DE_FOR_V)[1] > 1000 * largest
    assert max(update for _, update in factor) < 10 * largest  # DE-0: the same map without its zero


def test_stochastic_rounding() -> None:
    """7: the mean of 10**5 draws is the value, to 5 standard errors; a value of the map never moves."""
    q = Quantizer("dynamic4 flat=16 rounding=stochastic scale_format=float32")
    table = torch.from_numpy(get_format("dynamic4").values.astype(np.float32))
    generator = torch.Generator().manual_seed(0)
    exact = q.quantize(table.repeat(6250), generator=generator)
    assert torch.equal(exact.dequantize(), table.repeat(6250))
    x = torch.tensor([1.0, 0.9, 0.5, 0.3, 0.1, 0.05, 0.02, 0.004, -0.001, -0.02, -0.05, -0.1, -0.3, -0.5, -0.7, -0.88])
    draws = q.quantize(x.repeat(100_000), generator=generator).dequantize().view(-1, 16).double()
    gap = (draws.amax(0) - draws.amin(0)).clamp(min=1e-9)
    assert (draws[:, 0] == 1).all() and all(len(column.unique()) == 2 for column in draws.T[1:])
    assert ((draws.mean(0) - x).abs() < 5 * gap / 2 / 100_000**0.5 + 1e-7).all()


def test_locality_of_what_is_not_finite() -> None:
    """8: a NaN in the gradient is reported, and no code of another element differs, with rank-1 scales as well."""
    states = []
    for bad in (False, True):
        p = nn.Parameter(torch.ones(64, 80))
        optimizer = nybble.optim.AdamW4bit([("w", p)])
        p.grad = draw(64, 80)
        p.grad[5, 6] = 0.0
        optimizer.step()
        p.grad = draw(64, 80, seed=1)
        p.grad[5, 6] = torch.nan if bad else 0.0
        if bad:
            with pytest.warns(nybble.optim.NonFiniteWarning, match=r"1 element\(s\) of w"):
                optimizer.step()
        else:
            optimizer.step()
        states.append((p.detach(), *(optimizer.state[p][name].dequantize() for name in ("exp_avg", "exp_avg_sq"))))
    for a, b in zip(*states, strict=True):
        assert b.isfinite().all() and (a != b).sum() <= 1
