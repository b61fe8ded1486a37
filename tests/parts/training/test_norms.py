"""BatchNorms measured anew: torch's own way of the same, and what a rounded network really gives them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from nybble.core.errors import SchemeError
from nybble.learned import Learned
from nybble.training.norms import check_norms, measure_norms
from nybble.training.prepare import prepare


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4, momentum=0.3),
    )  # fmt: skip


def batches(count: int = 3) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [1 + at + torch.randn(5, 1, 9, 9, generator=draw) for at in range(count)]


def test_as_torch_does() -> None:
    """All batches alike, from nothing; modes and momenta are as they were."""
    made = network()
    for x in batches(2):
        made(x)  # statistics to be forgotten
    theirs = copy.deepcopy(made)
    update_bn(batches(), theirs)
    measure_norms(made.train(), lambda model: [model(x) for x in batches()])
    for name, t in theirs.state_dict().items():
        torch.testing.assert_close(made.state_dict()[name], t, rtol=1e-6, atol=1e-6)
    assert all(module.training for module in made.modules())
    assert [norm.momentum for norm in made if isinstance(norm, nn.BatchNorm2d)] == [0.1, 0.3]
    measure_norms(made.eval(), lambda model: model(batches()[0]))
    assert not any(module.training for module in made.modules())


def test_through_what_the_file_computes() -> None:
    """Noise stands for rounding while it trains; statistics are of what is rounded."""
    made: Any = prepare(
        network(),
        {"weights": "uint3 scale=minmax(offset=true)", "ignore": []},
        {"weights": {"pseudo-noise": {"group": 0}}},
    )
    (x,) = batches(1)
    measure_norms(made.train(), lambda model: model(x))
    assert all(each.training for each in made.modules() if isinstance(each, Learned))
    seen = made.eval()[0](x)
    torch.testing.assert_close(made[1].running_mean, seen.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(made[1].running_var, seen.var((0, 2, 3)), rtol=1e-5, atol=1e-6)


def test_where_there_are_none() -> None:
    for model in (nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False))):
        with pytest.raises(SchemeError, match=r"norm_batches.*Sequential has none that keep"):
            check_norms(model)
