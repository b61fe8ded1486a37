"""Memory of a training step by part: parameters, gradients, states, activations, beside what the allocator says.

Parts are counted from what the model, the optimizer and autograd hold; the total comes from elsewhere: on a GPU from
torch's allocator, on the CPU from the storages that operations made and that still live. What is in the total and in no
part is told as ``other``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nybble.nn.packed import Packed
from nybble.qtensor.block import BlockQTensor

FROZEN = ("packed", "frozen")
PARTS = (*FROZEN, "trained", "gradients", "states", "activations")
"""Packed weights, other parameters and buffers without gradients, parameters with, and what a step adds."""


@dataclass(frozen=True)
class Moment:
    """Bytes on the device at one moment of a step.

    Attributes:
        name: ``before``; after ``forward``, ``backward``, ``step``; and when gradients are ``cleared``.
        parts: by :data:`PARTS`; storages that several tensors share count once.
        requested: all that was asked for and is held. allocated: the same in the allocator's blocks.
        peak: most that was allocated since the moment before.
        host: bytes of states in the host's memory while the parameters are on a device.
    """

    name: str
    parts: dict[str, int]
    requested: int
    allocated: int
    peak: int
    host: int

    @property
    def other(self) -> int:
        """Held, and in no part: workspaces of libraries, a loss, what a model keeps beside its buffers."""
        return self.requested - sum(self.parts.values())


class _Allocator:
    """What torch's allocator of a GPU says."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        torch.cuda.reset_peak_memory_stats(device)

    def brought(self, there: Iterable[Tensor]) -> None:
        """The allocator knows them."""

    def read(self) -> tuple[int, int, int]:
        """Requested, allocated, and the most since the last call."""
        torch.cuda.synchronize(self.device)
        torch.empty(1, device=self.device)  # what other streams have used is only taken back at an allocation
        stats = torch.cuda.memory_stats(self.device)
        allocated, peak = (stats[f"allocated_bytes.all.{when}"] for when in ("current", "peak"))
        torch.cuda.reset_peak_memory_stats(self.device)
        return stats.get("requested_bytes.all.current", allocated), allocated, peak


class _Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Storages that operations make while this is on, and those that are brought, until they are let go of.

    What an operation takes and frees inside itself isn't seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held, self.most, self.known = 0, 0, weakref.WeakValueDictionary[int, Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.brought(t for t in tree_leaves(out) if isinstance(t, Tensor))
        return out

    def brought(self, there: Iterable[Tensor]) -> None:
        """Count these, too: they may have been made before."""
        for t in there:
            self._came(t)

    def _came(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        if self.known.get(id(storage)) is storage:
            return
        self.known[id(storage)] = storage
        self.held += storage.nbytes()
        self.most = max(self.most, self.held)
        weakref.finalize(storage, self._went, storage.nbytes())

    def _went(self, size: int) -> None:
        self.held -= size

    def read(self) -> tuple[int, int, int]:
        """As :meth:`_Allocator.read`."""
        most, self.most = self.most, self.held
        return self.held, self.held, most


def measure_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]
) -> tuple[list[Moment], float]:
    """One step, with its memory after each phase.

    Args:
        model: on its device. On the CPU what exists beside it (data, other models) is not counted.
        optimizer: over parameters of the model, without gradients yet.
        loss: evaluates the model: a scalar.

    Returns:
        the moments, and the loss.
    """
    device = next(model.parameters()).device
    meter: Any = _Allocator(device) if device.type == "cuda" else _Storages()
    meter.brought((*model.parameters(), *model.buffers(), *_states(optimizer)))
    moments: list[Moment] = []

    def note(name: str, activations: int = 0) -> None:
        requested, allocated, peak = meter.read()
        parts, host = _parts(model, optimizer, device)
        moments.append(Moment(name, parts | {"activations": activations}, requested, allocated, peak, host))

    with meter if isinstance(meter, TorchDispatchMode) else torch.enable_grad():
        note("before")
        with keeping(model, meter.brought) as kept:
            value = loss()
        note("forward", sum(kept.values()))
        torch.autograd.backward(value)
        found = float(value.detach())
        del value
        note("backward")
        optimizer.step()
        note("step")
        optimizer.zero_grad(set_to_none=True)
        note("cleared")
    return moments, found


@contextmanager
def keeping(model: nn.Module, told: Callable[[Iterable[Tensor]], None] = lambda _: None) -> Iterator[dict[int, int]]:
    """Bytes of each storage that autograd keeps for backward, but for the model's own, by its address.

    Args:
        model: whose parameters and buffers don't count.
        told: is given every tensor that counts.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            told([t])
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        yield kept


def _parts(model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> tuple[dict[str, int], int]:
    """Bytes by part on the device, without activations; those of states elsewhere."""
    packed = {id(t) for m in model.modules() if isinstance(m, Packed) for t in m.buffers()}
    every = [*model.parameters(), *model.buffers()]
    groups: dict[str, Iterable[Tensor]] = {
        "packed": [t for t in every if id(t) in packed],
        "frozen": [t for t in every if id(t) not in packed and not t.requires_grad],
        "trained": [t for t in every if t.requires_grad],
        "gradients": [p.grad for p in model.parameters() if p.grad is not None],
        "states": list(_states(optimizer)),
    }
    seen: set[int] = set()
    found = {name: _bytes((t for t in tensors if t.device == device), seen) for name, tensors in groups.items()}
    host = _bytes((t for t in groups["states"] if t.device != device and t.dim()), set())
    return found, host


def _states(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        for kept in state.values():
            if isinstance(kept, BlockQTensor):
                yield from kept.tensors().values()
            elif isinstance(kept, Tensor):
                yield kept


def _bytes(tensors: Iterable[Tensor], seen: set[int]) -> int:
    """Of storages that weren't seen before."""
    total = 0
    for t in tensors:
        storage = t.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total
