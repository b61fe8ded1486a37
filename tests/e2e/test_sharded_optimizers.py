"""Optimizers over DTensors, two processes on gloo: one process's numbers, and checkpoints of torch.distributed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.multiprocessing.spawn import spawn

import nybble.optim
from nybble.core.errors import SchemeError, UsageError

EVEN, ODD = (64, 128, 32), (50, 70, 45)
"""Widths whose halves are whole blocks of 256, and others."""
CASES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "8 bits": ("AdamW8bit", {}, EVEN),
    "by channels": ("Adam", {"state": "int8 channel"}, ODD),
    "groups of 4 bits": ("AdamW", {"state": {"exp_avg": "dynamic4 group=32", "exp_avg_sq": None}}, EVEN),
    "24 bits": ("Lion8bit", {"weights": "residual8"}, EVEN),
    "32 bits": ("AdamW32bit", {}, ODD),
    "odd": ("AdamW8bit", {}, ODD),
    "rank 1": ("AdamW4bit", {}, EVEN),
}
AS_ONE = ("8 bits", "by channels", "groups of 4 bits", "24 bits", "32 bits")
"""Cases whose blocks end where shards end: their numbers are those of one process."""


class Net(nn.Module):
    def __init__(self, widths: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        first, middle, last = widths
        self.one, self.two = nn.Linear(first, middle), nn.Linear(middle, last)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(self.one(x).tanh())
        return out


def begun(case: str, shard: bool, **more: Any) -> tuple[Any, Any]:
    name, options, widths = CASES[case]
    model = Net(widths, torch.bfloat16 if "weights" in options else torch.float32)
    if shard:
        for layer in (model.one, model.two, model):
            fully_shard(layer)
    optimizer = getattr(nybble.optim, name)(model.parameters(), lr=1e-2, **({"min_size": 200} | options | more))
    return model, optimizer


def train(model: Any, optimizer: Any, first: int, last: int, halves: Sequence[int]) -> list[float]:
    """Each half of a batch by whoever has it; the loss is the mean of the halves'."""
    losses = []
    for step in range(first, last):
        x = torch.randn(8, model.one.in_features, generator=torch.Generator().manual_seed(step))
        loss = 0.0
        for half in halves:
            y = model(x[4 * half : 4 * half + 4].to(next(model.parameters()).dtype)).float().square().mean()
            torch.autograd.backward(y / len(halves))
            loss += float(y.detach()) / len(halves)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    return losses


def whole(t: Any) -> Tensor:
    found: Tensor = t.full_tensor() if isinstance(t, DTensor) else t
    return found.detach()


def weights(model: Any) -> list[Tensor]:
    return [whole(p) for p in model.parameters()]


# ---------------------------------------------------------------------------------------------- what processes do
def _train(out: Path) -> None:
    """Every case; saved after four steps, gone on with, and once more from what was saved."""
    rank, count = dist.get_rank(), dist.get_world_size()
    for case in CASES:
        model, optimizer = begun(case, shard=True)
        losses = train(model, optimizer, 0, 4, [rank] if count > 1 else [0, 1])
        state = get_optimizer_state_dict(model, optimizer)
        save({"optim": state, "model": model.state_dict()}, checkpoint_id=out / case)
        full = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
        middle = weights(model)
        losses += train(model, optimizer, 4, 6, [rank] if count > 1 else [0, 1])
        found = {"losses": losses, "middle": middle, "weights": weights(model), "full": full}
        found["again"] = _load(case, out)
        torch.save(found, out / f"{case}-{rank}.pt")


def _load(case: str, out: Path) -> Any:
    """From a checkpoint, to the end: the weights."""
    rank, count = dist.get_rank(), dist.get_world_size()
    model, optimizer = begun(case, shard=True)
    state = {"optim": get_optimizer_state_dict(model, optimizer), "model": model.state_dict()}
    load(state, checkpoint_id=out / case)
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optim"])
    train(model, optimizer, 4, 6, [rank] if count > 1 else [0, 1])
    return weights(model)


def _others(out: Path) -> None:
    """Replicated parameters; rules of whole tensors."""
    mesh = init_device_mesh("cpu", (2,))
    start = torch.linspace(-1, 1, 70 * 50).view(70, 50)
    shared = nn.Parameter(distribute_tensor(start, mesh, [Replicate()]))
    optimizer = nybble.optim.LAMB8bit([shared], lr=0.1, min_size=64)
    for step in range(3):
        g = torch.randn(70, 50, generator=torch.Generator().manual_seed(step))
        shared.grad = distribute_tensor(g, mesh, [Replicate()])
        optimizer.step()
    codes = optimizer.state_dict()["state"][0]["exp_avg"]["codes"]
    said = []
    model: Any = fully_shard(Net(EVEN, torch.float32))
    for name in ("LAMB8bit", "LARS8bit", "Adafactor", "Factor4bit", "Muon8bit"):
        try:
            getattr(nybble.optim, name)([model.one.weight])
        except UsageError as error:
            said.append(str(error))
    plain = begun("8 bits", shard=False)
    train(*plain, 0, 4, [0, 1])
    model, optimizer = begun("8 bits", shard=True)
    optimizer.load_state_dict(plain[1].state_dict())  # one process's, cut here
    model_too = {name: distribute_tensor(p.detach(), mesh, model.get_parameter(name).placements)
                 for name, p in plain[0].named_parameters()}  # fmt: skip
    model.load_state_dict(model_too)
    train(model, optimizer, 4, 6, [dist.get_rank()])
    cut = weights(model)
    drawn = nybble.optim.AdamW([model.one.weight], state="int8 channel rounding=stochastic", min_size=0)
    model.one.weight.grad = distribute_tensor(torch.ones(128, 64).cumsum(1), mesh, model.one.weight.placements)
    drawn.step()
    halves = whole(drawn.state_dict()["state"][0]["exp_avg"]["codes"]).view(2, -1)
    found = {"weight": whole(shared), "codes": whole(codes), "said": said, "cut": cut, "halves": halves}
    torch.save(found, out / f"others-{dist.get_rank()}.pt")


def _read_by_one(out: Path, count: int) -> None:
    """What two saved, in one process."""
    found: dict[str, Any] = {}
    for case in CASES:
        try:
            found[case] = _load(case, out)
        except CheckpointException as error:
            found[case] = f"{type(error).__name__}: {error}"
    torch.save(found, out / "by one.pt")


def _worker(rank: int, out: Path, count: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/meet{count}", rank=rank, world_size=count)
    try:
        if count == 2:
            _train(out)
            _others(out)
        else:
            _read_by_one(out, count)
    finally:
        dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------- tests
@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes leave, and one that reads it."""
    made = tmp_path_factory.mktemp("sharded")
    for count in (2, 1):
        spawn(_worker, (made, count), nprocs=count)  # type: ignore[no-untyped-call]
    return made


def left(out: Path, name: str) -> Any:
    return torch.load(out / f"{name}.pt", weights_only=True)


def one_process(case: str, **options: Any) -> tuple[Any, Any, list[float]]:
    torch.set_num_threads(1)
    model, optimizer = begun(case, shard=False, **options)
    return model, optimizer, train(model, optimizer, 0, 6, [0, 1])


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(out: Path, case: str) -> None:
    """Where blocks end with shards bit for bit; elsewhere it is as near to 32 bits as one process is."""
    model, _, losses = one_process(case)
    first, second = (left(out, f"{case}-{rank}") for rank in range(2))
    assert equal(first["weights"], second["weights"])
    both = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
    if case in AS_ONE:
        assert both == losses
        assert equal(first["weights"], weights(model))
    else:
        assert not equal(first["weights"], weights(model))
        assert both == pytest.approx(losses, rel=0.02)
        wide = one_process(case, state=None)[0]
        far, usual = (
            sum(float((x - y).square().sum()) for x, y in zip(found, weights(wide), strict=True)) ** 0.5
            for found in (first["weights"], weights(model))
        )
        assert 0 < far < 1.5 * usual


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_goes_on_unchanged(out: Path, case: str) -> None:
    for rank in range(2):
        found = left(out, f"{case}-{rank}")
        assert equal(found["again"], found["weights"]) and not equal(found["middle"], found["weights"])


@pytest.mark.parametrize("case", CASES)
def test_one_process_reads_what_two_saved(out: Path, case: str) -> None:
    """Where blocks end with shards; elsewhere the missing name says what there would have to be."""
    found = left(out, "by one")[case]
    if case in AS_ONE:
        assert equal(found, weights(one_process(case)[0]))
    else:
        assert (
            isinstance(found, str) and "Missing key in checkpoint state_dict: optim.state.one.weight.exp_avg" in found
        )


@pytest.mark.parametrize("case", AS_ONE)
def test_the_whole_state_is_that_of_one_process(out: Path, case: str) -> None:
    """Gathered by torch, and set in a model that isn't sharded."""
    full = left(out, f"{case}-0")["full"]
    model, optimizer = begun(case, shard=False)
    train(model, optimizer, 0, 4, [0, 1])
    other, fresh = begun(case, shard=False)
    set_optimizer_state_dict(other, fresh, full)
    ours, theirs = fresh.state_dict()["state"], optimizer.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    for index, entry in theirs.items():
        for name, kept in entry.items():
            for key, x in kept.items() if isinstance(kept, dict) else [("", kept)]:
                y = ours[index][name][key] if key else ours[index][name]
                assert torch.equal(x, y) if isinstance(x, Tensor) else x == y, (index, name, key)


def test_shards_that_are_read_elsewhere_are_refused(out: Path) -> None:
    model, optimizer = begun("odd", shard=False)
    full = left(out, "odd-0")["full"]
    with pytest.raises(SchemeError, match=r"exp_avg: it was saved in the shards \[0:35, 0:50\] of \[70, 50\]"):
        set_optimizer_state_dict(model, optimizer, full)


def test_replicated_and_refused(out: Path) -> None:
    """A whole tensor on each is a tensor; rules that look at one say why they can't have a shard."""
    first, second = (left(out, f"others-{rank}") for rank in range(2))
    assert torch.equal(first["weight"], second["weight"]) and torch.equal(first["codes"], second["codes"])
    p = nn.Parameter(torch.linspace(-1, 1, 70 * 50).view(70, 50))
    optimizer = nybble.optim.LAMB8bit([p], lr=0.1, min_size=64)
    for step in range(3):
        p.grad = torch.randn(70, 50, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    assert torch.equal(p, first["weight"])
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"]["codes"], first["codes"])
    assert len(first["said"]) == 5
    assert "LAMB8bit looks at whole tensors, and this one is sharded ([0:64, 0:64] of [128, 64])" in first["said"][0]
    assert equal(first["cut"], weights(one_process("8 bits")[0]))
    assert not torch.equal(*first["halves"])  # shards draw numbers of their own
