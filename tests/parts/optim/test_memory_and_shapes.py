"""Parameters that share memory, and parameters whose shape is another than that of their states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nybble.optim
from nybble.core.errors import FileError, UsageError
from nybble.kernels._library import library
from nybble.optim import LowBitOptimizer, _fused

FACTORED = {"Adafactor": "variance", "Factor": "exp_avg_sq"}
"""Rules that keep rows and columns of a matrix, and what they keep of a vector instead."""


def stepped(optimizer: LowBitOptimizer, steps: int) -> list[Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(steps):
        for k, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + k))
        optimizer.step()
    return [p.detach().clone() for p in params]


def over(rule: str, *shape: int) -> LowBitOptimizer:
    made: LowBitOptimizer = getattr(nybble.optim, rule)([("w", nn.Parameter(torch.ones(shape)))], min_size=0)
    return made


@pytest.mark.parametrize("rule", FACTORED)
def test_states_of_a_matrix_are_none_of_a_vector(rule: str) -> None:
    """Of as many elements, either way, from a file or after the parameter was given another shape."""
    matrix, vector = over(rule, 32, 64), over(rule, 2048)
    for optimizer in (matrix, vector):
        stepped(optimizer, 1)
    saved = vector.state_dict(), matrix.state_dict()
    for mine, other, kept in ((matrix, saved[0], "row"), (vector, saved[1], FACTORED[rule])):
        before = stepped(mine, 0) + [torch.tensor(float(len(s))) for s in mine.state.values()]
        with pytest.raises(FileError, match=rf"^w: .*were saved; .*{kept}.* are kept here.*parameters of the shapes"):
            mine.load_state_dict(other)
        (p,) = mine.param_groups[0]["params"]
        p.data = p.data.view(-1) if p.dim() == 2 else p.data.view(32, 64)
        p.grad = torch.ones_like(p)
        with pytest.raises(UsageError, match=r"w has shape \[.*\] now, and its \w+ is of \[.*del optimizer"):
            mine.step()
        after = [p.detach().view_as(before[0]), torch.tensor(float(len(mine.state[p])))]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        del mine.state[p]
        mine.step()
        assert float(mine.state[p]["step"]) == 1 and not torch.equal(p.detach().view_as(before[0]), before[0])


def shared(fused: bool | None, state: str) -> LowBitOptimizer:
    """Matrices in one memory: the third of a group is the first two, and another group has parts of both."""
    memory = torch.linspace(-1, 1, 3 * 4096)
    parts = [memory[:4096], memory[4096:8192], memory[:8192], memory[8192:]]
    groups: list[dict[str, Any]] = [{"params": [nn.Parameter(x.view(-1, 64)) for x in parts]}]
    groups.append({"params": [nn.Parameter(memory[2048:6144].view(64, 64))], "lr": 0.5})
    made: LowBitOptimizer = nybble.optim.AdamW(groups, lr=0.1, state=state, min_size=0, fused=fused)
    return made


@pytest.mark.parametrize("state", ["state8", "state4"])
def test_parameters_that_share_memory_are_stepped_in_turn(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by torch's, one after another; those that share nothing go on together."""
    if library() is None:
        pytest.skip("no C++ compiler")
    launches: list[int] = []
    kernel = _fused.find_kernel(torch.device("cpu"))
    assert kernel is not None
    run = kernel.run

    def counted(_: Any, launch: _fused.Launch) -> None:
        launches.append(len(launch.members))
        run(launch)

    monkeypatch.setattr(type(kernel), "run", counted)
    one, other = shared(None, state), shared(False, state)
    assert [row["reason"] for row in one.kernels() if row["kernel"] is None] == []
    assert all(torch.equal(a, b) for a, b in zip(stepped(one, 3), stepped(other, 3), strict=True))
    assert launches == [1, 1, 2, 1] * 3


def test_who_shares_memory() -> None:
    memory = torch.zeros(3, 64)
    assert _fused._overlapping(list(memory)) == set()
    assert _fused._overlapping([memory[0], memory[1:], memory[2], memory[0, 63:]]) == {0, 1, 2, 3}
    assert _fused._overlapping([memory[2], memory[0], memory, memory[1]]) == {0, 1, 2, 3}
