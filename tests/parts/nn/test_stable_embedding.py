"""The stable embedding against bitsandbytes', and its states."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from nybble.nn.stable_embedding import StableEmbedding
from nybble.optim.adamw import AdamW

with warnings.catch_warnings():  # what it looks for at import is none of ours
    warnings.simplefilter("ignore")
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="the oracle: pip install bitsandbytes")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_bitsandbytes(dtype: torch.dtype) -> None:
    """The same start from the same seed, the same output and gradients."""
    made: list[Any] = []
    for kind in (StableEmbedding, bitsandbytes.nn.StableEmbedding):
        torch.manual_seed(0)
        made.append(kind(50, 24, padding_idx=3))
        made[-1].weight.data = made[-1].weight.data.to(dtype)  # theirs misplaces its argument for that
    ours, theirs = made
    assert StableEmbedding(50, 24, dtype=torch.bfloat16).weight.dtype == torch.bfloat16
    tokens = torch.tensor([[1, 3, 7], [49, 7, 0]])
    for module in made:
        nn.init.normal_(module.norm.weight, generator=torch.Generator().manual_seed(1))
        torch.autograd.backward(module(tokens).float().square().sum())
    assert torch.equal(ours.weight, theirs.weight) and not ours.weight[3].any()
    assert ours(tokens).dtype == dtype and torch.equal(ours(tokens), theirs(tokens))
    assert torch.equal(ours.weight.grad, theirs.weight.grad) and torch.equal(ours.norm.bias.grad, theirs.norm.bias.grad)


def test_its_states_are_float32() -> None:
    """Of bare parameters too, and of a copy; a table beside it has 8 bits."""
    model = nn.ModuleList([StableEmbedding(64, 64), nn.Embedding(64, 64)])
    for tables in (model, copy.deepcopy(model)):
        optimizer = AdamW(tables.parameters())
        for p in tables.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        kinds = [type(optimizer.state[table.weight]["exp_avg"]).__name__ for table in tables]  # type: ignore[index]
        assert kinds == ["Tensor", "BlockQTensor"]
        resumed = AdamW(tables.parameters())
        resumed.load_state_dict(optimizer.state_dict())
        assert resumed.state_bytes() == optimizer.state_bytes()
