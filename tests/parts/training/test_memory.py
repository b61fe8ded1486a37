"""A step's memory by part adds up to what operations made, and each part to its formula."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.tiny import tiny_model
from torch import Tensor, nn

import nybble.optim
from nybble.nn.linear import QuantLinear
from nybble.nn.swap import set_module
from nybble.quantizer import Quantizer
from nybble.training.memory import Moment, measure_step


def moments_of(model: Any, optimizer: Any, steps: int = 2) -> list[Moment]:
    ids = torch.randint(3, 50, (2, 24), generator=torch.Generator().manual_seed(0))

    def loss() -> Tensor:
        value: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        return value

    for _ in range(steps):
        found, value = measure_step(model, optimizer, loss)
    assert value == value
    return found


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdamW32bit", "torch"])
def test_every_byte_has_its_part(name: str) -> None:
    """But a loss of 4 bytes, the ids that the caller holds, and a count of 8 for each quantized parameter."""
    model = tiny_model(dtype=torch.float32).train()
    size = sum(p.numel() for p in model.parameters())
    kind: Any = torch.optim.AdamW if name == "torch" else getattr(nybble.optim, name)
    optimizer = kind(model.parameters(), **({} if name in ("torch", "AdamW32bit") else {"min_size": 0, "fused": False}))
    moments = moments_of(model, optimizer)
    assert [moment.name for moment in moments] == ["before", "forward", "backward", "step", "cleared"]
    ids, count = 2 * 24 * 8, 8 * len(list(model.parameters()))
    for moment in moments:
        told = {"before": 0, "forward": 4, "backward": ids, "step": ids + count, "cleared": ids + count}[moment.name]
        quantized = name not in ("torch", "AdamW32bit")
        assert moment.other == (told if quantized else min(told, ids)), moment
        assert moment.allocated == moment.requested <= moment.peak and moment.host == 0
        assert moment.parts["trained"] == 4 * size and moment.parts["packed"] == 0
        assert moment.parts["gradients"] == (4 * size if moment.name in ("backward", "step") else 0)
        assert (moment.parts["activations"] > 0) == (moment.name == "forward")
    kept = sum(optimizer.state_bytes().values()) if name != "torch" else 8 * size + 4 * len(list(model.parameters()))
    assert moments[-1].parts["states"] == kept


def test_checkpointing_keeps_less_and_peaks_in_backward() -> None:
    plain = tiny_model().train()
    again: Any = copy.deepcopy(plain)
    turn_on = getattr(again, "activation_checkpointing_enable", None) or again.gradient_checkpointing_enable
    turn_on({"use_reentrant": False})
    kept = {}
    for model in (plain, again):
        moments = moments_of(model, torch.optim.SGD(model.parameters()), 1)
        kept[model] = moments[1].parts["activations"]
        assert 0 <= moments[1].other < 0.01 * moments[1].requested + 8192  # cosines that closures hold
    assert kept[again] < kept[plain] / 2
    assert moments[2].peak - moments[2].requested > kept[again]  # a block's activations, made again


def test_frozen_packed_and_shared() -> None:
    """Packed weights by their bytes, a shared table once, what is in no operation's output not at all."""
    model: Any = nn.Module()
    model.table, model.middle, model.head = nn.Embedding(50, 64), nn.Linear(64, 64, bias=False), nn.Linear(64, 50)
    model.head.weight = model.table.weight
    packed = Quantizer("int4 group=32").quantize(model.middle.weight.detach())
    set_module(model, "middle", QuantLinear(packed))
    model.head.bias.requires_grad_(False)

    def loss() -> Tensor:
        value: Tensor = model.head(model.middle(model.table(torch.arange(50)))).square().mean()
        return value

    moments, _ = measure_step(model, nybble.optim.SGD8bit(model.table.parameters(), momentum=0.9, fused=False), loss)
    parts = moments[-1].parts
    assert parts["packed"] == packed.nbytes() == 64 * 64 // 2 + 2 * 128
    assert parts["trained"] == 4 * 50 * 64 and parts["frozen"] == 4 * 50
    assert moments[-1].other == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_allocator_of_a_gpu() -> None:
    """Paged states are the host's; the rest is what the allocator holds, but for cuBLAS's workspaces."""
    model: Any = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 1024)).cuda()
    x = torch.ones(8, 1024, device="cuda")
    optimizer = nybble.optim.PagedAdamW8bit(model.parameters())

    def loss() -> Tensor:
        value: Tensor = model(x).square().mean()
        return value

    measure_step(model, optimizer, loss)
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    moments, _ = measure_step(model, optimizer, loss)
    assert before == moments[-1].requested
    states = sum(optimizer.state_bytes()[name] for name in ("exp_avg", "exp_avg_sq"))
    assert moments[-1].host == states - 2 * 2 * 4 * 1024 and moments[-1].parts["states"] == 2 * 2 * 4 * 1024
    assert moments[2].parts["gradients"] == moments[2].parts["trained"] == 4 * 2 * (1024 * 1024 + 1024)
    assert 0 <= moments[-1].other < 128 << 20
