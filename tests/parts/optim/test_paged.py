"""Paged states: the same numbers and state dicts as others, and few of them on the device at a time."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nybble.optim
from nybble.core.errors import UsageError
from nybble.optim import _paged
from nybble.optim._states import each_tensor

SHAPES = ((400, 300), (64, 64), (350, 300), (320, 400), (110_000,), (300, 500), (7,))
GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


class Counted(_paged.Copies):
    """A device that is apart from the host by what is copied to it; the bytes that are there."""

    def __init__(self) -> None:
        self.there = self.most = self.ups = self.downs = 0

    def up(self, state: Any, device: torch.device) -> Any:
        def copied(t: Tensor) -> Tensor:
            return self.came(t.clone())

        self.ups += 1
        return {name: x if name == "step" else each_tensor(x, copied) for name, x in state.items()}, lambda: None

    def down(self, state: Any) -> Any:
        moved = {name: x if name == "step" else each_tensor(x, torch.clone) for name, x in state.items()}
        for name, kept in state.items():
            if name != "step":
                each_tensor(kept, self.came)  # what the update made there
        self.downs += 1
        return moved, lambda: None

    def came(self, t: Tensor) -> Tensor:
        size = t.numel() * t.element_size()
        self.there += size
        self.most = max(self.most, self.there)
        weakref.finalize(t, self.went, size)
        return t

    def went(self, size: int) -> None:
        self.there -= size


def test_which_parameters_are_paged() -> None:
    """bitsandbytes' number of elements; what lies in the host's memory already, and what holds no numbers, stays."""

    class There(Tensor):
        """A parameter that says that it is on a GPU."""

        device = torch.device("cuda")

    def paged(count: int) -> bool:
        return _paged.is_paged(torch.zeros(count).as_subclass(There))

    assert paged(100_000) and not paged(99_999)
    assert not _paged.is_paged(torch.zeros(100_000)) and not _paged.is_paged(torch.zeros(100_000, device="meta"))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    """The CPU as a device whose memory is not the host's."""
    made = Counted()
    monkeypatch.setattr(nybble.optim, "is_paged", lambda p: p.numel() >= _paged.LEAST)
    monkeypatch.setattr(nybble.optim, "copies_for", lambda device: made)
    yield made


def parameters(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in SHAPES]


def train(optimizer: Any, first: int, last: int) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
            if i == step:
                p.grad = None
        optimizer.step()


def leaves(x: Any, path: str = "") -> dict[str, Any]:
    if isinstance(x, dict | list):
        items = x.items() if isinstance(x, dict) else enumerate(x)
        return {k: v for key, value in items for k, v in leaves(value, f"{path}/{key}").items()}
    return {path: x}


def same(a: Any, b: Any) -> None:
    one, other = leaves(a), leaves(b)
    assert one.keys() == other.keys()
    for key, x in one.items():
        assert torch.equal(x.cpu(), other[key].cpu()) if isinstance(x, Tensor) else x == other[key], key


RULES: dict[str, dict[str, Any]] = {
    "AdamW8bit": {},
    "AdamW4bit": {"weights": "residual8"},
    "AdamW32bit": {},
    "SGD8bit": {"momentum": 0.9, "state": "state8 rounding=stochastic"},
    "Factor4bit": {},
}


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("name", RULES)
def test_the_same_numbers(name: str, device: str, counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, states and state dicts; what one saved the other goes on from."""
    if device == "cuda":
        monkeypatch.undo()
    dtype = torch.bfloat16 if "weights" in RULES[name] else torch.float32
    made, weights = [], []
    for prefix in ("", "Paged"):
        params = parameters(dtype, device)
        optimizer = getattr(nybble.optim, prefix + name)(params, **RULES[name])
        train(optimizer, 0, 4)
        made.append(optimizer)
        weights.append(params)
    plain, paged = made
    assert paged.param_groups[0]["is_paged"] and not plain.param_groups[0]["is_paged"]
    same([p.data for p in weights[0]], [p.data for p in weights[1]])
    same(plain.state_dict(), paged.state_dict())
    plain.load_state_dict(paged.state_dict())
    paged.load_state_dict(plain.state_dict())
    train(plain, 4, 6)
    train(paged, 4, 6)
    same([p.data for p in weights[0]], [p.data for p in weights[1]])
    same(plain.state_dict(), paged.state_dict())
    assert paged.param_groups[0]["is_paged"] and not plain.param_groups[0]["is_paged"]
    for p in weights[1]:
        for state, kept in paged.state[p].items():
            if device == "cuda" and state != "step":
                held = [kept] if isinstance(kept, Tensor) else kept.tensors().values()
                far = p.numel() >= _paged.LEAST
                assert all(t.is_pinned() if far else t.is_cuda for t in held)


def test_few_are_there_at_a_time(counted: Counted) -> None:
    """A parameter's states come, are updated and go: of five large ones never more than three are there."""
    params = parameters()
    optimizer = nybble.optim.PagedAdamW8bit(params)
    large = [p for p in params if p.numel() >= 100_000]
    train(optimizer, 9, 11)
    ups, downs = counted.ups, counted.downs
    assert ups == downs == 2 * len(large) == 10
    assert counted.there == 0
    of_one = sum(optimizer.state_bytes()[name] for name in ("exp_avg", "exp_avg_sq")) // len(large)
    largest = 2 * 150_000 + 2 * 4 * -(-150_000 // 256)
    assert of_one < largest < counted.most <= 4 * largest  # of the one that is updated, what was and what comes of it


def test_an_update_that_fails(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    """What came first has its new states, all others keep theirs, and the next step goes on."""
    params = parameters()
    optimizer = nybble.optim.PagedAdamW8bit(params, fused=False)
    train(optimizer, 9, 10)
    before, calls, plain = optimizer.state_dict(), list[int](), type(optimizer).update

    def failing(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:  # two are small
            raise MemoryError
        return plain(*given)

    monkeypatch.setattr(optimizer, "update", failing)
    with pytest.raises(MemoryError):
        train(optimizer, 10, 11)
    after = optimizer.state_dict()["state"]
    assert [int(after[i]["step"]) for i in range(7)] == [2, 2, 1, 1, 1, 1, 2]
    same(after[2], before["state"][2])
    monkeypatch.undo()
    train(optimizer, 11, 12)
    assert [int(optimizer.state[p]["step"]) for p in params] == [3, 3, 2, 2, 2, 2, 3]


def test_said_wrongly() -> None:
    with pytest.raises(UsageError, match="is_paged is True or False; got 'yes'"):
        nybble.optim.AdamW8bit(parameters(), is_paged="yes")
    with pytest.raises(AttributeError, match="PagedNadam8bit"):
        _ = nybble.optim.PagedNadam8bit
    for name in ("PagedPagedAdamW", "PagedLowBitOptimizer", "Paged", "Pagedflatten"):
        with pytest.raises(AttributeError, match=name):
            getattr(nybble.optim, name)
    with pytest.raises(UsageError, match="AdamW32bit keeps float32 states, which have no blocks"):
        nybble.optim.AdamW32bit(parameters(), block_size=64)
