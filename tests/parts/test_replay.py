"""A replayed function gives what the function gives."""

from __future__ import annotations

import pytest
import torch

from nybble.core.replay import replayed
from nybble.quantizer import Quantizer
from nybble.solvers._ladder import Ladder, descend

LINES = (
    "e2m1 channel", "int4 channel", "int4 channel scale=minmax", "e2m1 group=32 scale_format=float16", "nvfp4", "mxfp4",
    "nf4 flat=64", "e2m1 shifted static", "int8 tensor static",
)  # fmt: skip


def test_on_a_cpu_it_is_the_function() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    assert replayed(function, torch.zeros(2), 100) is function


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are captured on GPUs")
@pytest.mark.parametrize("line", LINES)
def test_a_search_on_the_gpu_finds_what_it_finds_without_graphs(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 128, device="cuda")
    ladder = Ladder(x, Quantizer(line))

    def error(values: torch.Tensor) -> torch.Tensor:
        rows = (values - x).square().sum(1)
        return rows if ladder.units == len(x) else rows.sum().reshape(1)

    one = torch.ones(ladder.units, device="cuda")
    first = (one, error(ladder.values(one)))
    grid = torch.logspace(-2, 0.2, 40, 2.0, device="cuda")
    with_graph = descend(ladder, error, first, grid, 4, 1.1)
    monkeypatch.setattr("nybble.core.replay.WORTH", 10**6)
    without = descend(ladder, error, first, grid, 4, 1.1)
    assert all(torch.equal(a, b) for a, b in zip(with_graph, without, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are captured on GPUs")
def test_what_cannot_be_captured_runs_as_it_is() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return x * float(x.sum())  # waits for the device

    x = torch.arange(4.0, device="cuda")
    assert torch.equal(replayed(function, x, 100)(x), x * 6)
    assert torch.equal(replayed(lambda y: y * 2, x, 100)(x), x * 2)
