"""Optimizers from a line: ours with every preset, torch's own, and what is refused."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

import nybble.optim
from nybble.core.errors import UsageError
from nybble.training.optimizers import make_optimizer, parse_optimizer, state_bytes

OURS = [part.__name__ for part in nybble.optim.REGISTRY.all().values()] + nybble.optim.preset_names()
TORCH = [
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
]
REFUSED = {"LBFGS", "SparseAdam"}


def stepped(line: str) -> tuple[torch.optim.Optimizer, float]:
    """The optimizer after a step on a matrix, and how far the matrix went."""
    model = nn.Linear(64, 80, bias=False)
    before = model.weight.detach().clone()
    optimizer = make_optimizer(line, model, 0.01)
    generator = torch.Generator().manual_seed(0)
    model.weight.grad = torch.randn(model.weight.shape, generator=generator)
    optimizer.step()
    return optimizer, float((model.weight.detach() - before).norm())


@pytest.mark.parametrize("name", OURS)
def test_ours_and_every_preset(name: str) -> None:
    optimizer, moved = stepped(name)
    assert type(optimizer) is getattr(nybble.optim, name) and moved > 0
    if "weight_decay" in inspect.signature(type(optimizer)).parameters:
        assert optimizer.param_groups[0]["weight_decay"] == 0  # what trains here isn't to shrink unasked


@pytest.mark.parametrize("name", sorted(set(TORCH) - REFUSED))
def test_torchs_own(name: str) -> None:
    optimizer, moved = stepped(f"torch.{name}")
    assert type(optimizer) is getattr(torch.optim, name) and moved > 0
    assert type(make_optimizer(f"torch.optim.{name}", nn.Linear(64, 80, bias=False), 0.01)) is type(optimizer)
    if name not in OURS:
        assert parse_optimizer(name)[0] is type(optimizer)


def test_options_arrive() -> None:
    optimizer, _ = stepped("torch.AdamW betas='[0.5, 0.9]' weight_decay=0.1 foreach=true")
    group = optimizer.param_groups[0]
    assert (*group["betas"], group["weight_decay"], group["foreach"]) == (0.5, 0.9, 0.1, True)
    assert state_bytes(optimizer) == 2 * 4 * 64 * 80 + 4
    packed, _ = stepped("AdamW8bit min_size=0")
    assert state_bytes(packed) < 2.1 * 64 * 80


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("torch.LBFGS", "can't be used: it asks for the loss several times a step"),
        ("SparseAdam", "it takes sparse gradients"),
        ("torch.Optimizer", "unknown optimizer 'torch.Optimizer'"),
        ("LowBitOptimizer", "unknown optimizer 'LowBitOptimizer'"),
        ("AdamW8bits", "Did you mean 'AdamW8bit'"),
        ("torch.AdamW fuse=true", "no option 'fuse' here. Did you mean 'fused'"),
        ("torch.AdamW betas=[2,3]", r"optimizer 'torch.AdamW betas=\[2,3\]': Invalid beta parameter"),
        ("torch.SGD momentum=-1", "Invalid momentum"),
        ("AdamW 'state=", "give a name, and options as NAME=VALUE"),
        ("", "give a name"),
        ("AdamW lr=1", "no option 'lr' here"),
        ("AdamW args=1", "no option 'args' here. Known: amsgrad, betas, "),
    ],
)
def test_what_is_refused(line: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_optimizer(line, nn.Linear(64, 80, bias=False), 0.01)
