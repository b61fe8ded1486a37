"""Several processes on one job, through torch.distributed: who does what, and what they tell each other.

``torchrun --nproc-per-node 2 -m nybble quantize ...`` (or ``train``) is all that is said; from Python, whoever has
initialised a process group has said it too. Every process (rank) holds the same weights and hidden states, so that what
isn't shared is done by all alike, and is right. Shared are batches of a pass (:func:`share`), whose sums are added up
(:func:`total`), and pieces of work whose results one rank gives to all (:func:`spread`). **No number depends on how
many ranks there are**: what is summed is float32 in float64, where the order of so few terms does not matter, or comes
one by one, and what one rank gives to the others are its bytes. The first rank writes, and speaks.

Outside of :func:`together`, and in a process by itself, every function here does nothing but give back what it got.
"""

from __future__ import annotations

import io
import os
import pickle  # noqa: TID251  (between processes of one run, as torch.distributed's own; never a file)
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nybble.core.errors import DeviceError, NybbleError, UsageError

T = TypeVar("T")
Head = tuple[int, bytes, list[tuple[torch.Size, torch.dtype]]]
_SPOKEN = {"cpu": "gloo", "cuda": "nccl"}


class _State:
    """Whether work is shared now, and whether a rank has failed."""

    active = False
    failed = False


@contextmanager
def started(device: str) -> Iterator[str]:
    """Inside, the process group that torchrun asks for, if it does; the device of this rank: each has a GPU of its own.

    Raises:
        DeviceError: there are fewer GPUs than ranks here.
    """
    alone = not dist.is_available() or not dist.is_torchelastic_launched() or os.environ.get("WORLD_SIZE") == "1"
    if alone or dist.is_initialized():
        yield device
        return
    backend = _SPOKEN["cpu"]
    if device == "cuda":
        here, known = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if here >= known:
            raise DeviceError(f"process {here} of this machine finds no GPU of its own: there are {known}.")
        torch.cuda.set_device(here)
        device, backend = f"cuda:{here}", ",".join(f"{kind}:{name}" for kind, name in _SPOKEN.items())
    dist.init_process_group(backend, timeout=timedelta(days=2))
    try:
        yield device
    finally:
        dist.destroy_process_group()


@contextmanager
def together() -> Iterator[None]:
    """Share the work inside with the other processes of the group, if there is one; an error in one stops all.

    Raises:
        NybbleError: what another rank was stopped by.
    """
    if _State.active or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        yield
        return
    _State.active, _State.failed = True, False
    try:
        yield
        gather(None)  # nobody is done before all are
    except Exception as error:
        if not _State.failed:  # the others don't know
            known = isinstance(error, NybbleError)
            _exchange((error if known else DeviceError(f"rank {number()}: {type(error).__name__}: {error}"), None))
        raise
    finally:
        _State.active = False


def size() -> int:
    """How many ranks share the work."""
    return dist.get_world_size() if _State.active else 1


def size_here() -> int:
    """How many of them share this machine's memory."""
    return min(size(), int(os.environ.get("LOCAL_WORLD_SIZE", size())))


def number() -> int:
    """Which rank this is, from 0."""
    return dist.get_rank() if _State.active else 0


def leads() -> bool:
    """Whether this rank is the one that writes."""
    return number() == 0


def tag() -> str:
    """What keeps names of a rank's own files apart from the first one's; nothing for that."""
    return f"{number()}." if number() else ""


def share(count: int) -> range:
    """Which of ``count`` things this rank takes: neighbours, as many as the others do."""
    return range(count * number() // size(), count * (number() + 1) // size())


def owners(costs: Sequence[float]) -> list[int]:
    """Which rank takes each of some things: the dearest first, each by whoever has least to do.

    Args:
        costs: of each, in any unit.
    """
    found, busy = [0] * len(costs), [0.0] * size()
    for place in sorted(range(len(costs)), key=lambda n: -costs[n]):
        found[place] = busy.index(min(busy))
        busy[found[place]] += costs[place]
    return found


def gather(value: T) -> list[T]:
    """What each rank has, in their order; small things without tensors.

    Raises:
        NybbleError: a rank was stopped.
    """
    return [value] if size() == 1 else [found for _, found in _exchange((None, value))]


def lead_says(value: T) -> T:
    """The first rank's value."""
    return gather(value if leads() else None)[0] if size() > 1 else value  # type: ignore[return-value]


def lead_alone(work: Callable[[], T]) -> T:
    """What the first rank's work gives, to all, who wait for it; nothing is shared inside.

    Args:
        work: gives small things without tensors.
    """
    if size() == 1:
        return work()
    found = None
    if leads():
        _State.active = False
        try:
            found = work()
        finally:
            _State.active = True
    return lead_says(found)  # type: ignore[return-value]


def lead_makes(make: Callable[[], T], device: torch.device) -> T:
    """What the first rank makes, to all; the others wait for it. For work that can't be shared without other numbers.

    Args:
        make: asks nothing of other ranks; what it gives can be pickled, tensors in it too.
        device: of the tensors that come.
    """
    if size() == 1:
        return make()
    ((_, found),) = spread({0: make()} if leads() else {}, device)
    return found


@contextmanager
def in_order() -> Iterator[None]:
    """The first rank does what is inside, then the others, who may read what it wrote."""
    if not leads():
        gather(None)
    yield
    if leads():
        gather(None)


def agreed(asked: Mapping[str, object]) -> None:
    """Refuse work on which the ranks disagree; ``asked``: what is to be done, small things by name.

    Raises:
        UsageError: they do; names the first thing, and what two of them have there.
    """
    first, *rest = gather(dict(_leaves(asked)))
    for rank, other in enumerate(rest, 1):
        for name in first:
            if other.get(name) != first[name]:
                was, now = (f"{str(value)[:80]}" for value in (first[name], other.get(name)))
                raise UsageError(
                    f"the processes are asked for different things: {name} is {was}; of rank {rank} {now}."
                )


def _leaves(asked: Mapping[str, object], path: str = "") -> Iterator[tuple[str, object]]:
    """Nested mappings as one, with dotted names."""
    for name, value in asked.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def total(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """The sum over ranks, in the tensor's dtype and in its memory; None (nothing to add) counts as zeros.

    Args:
        tensor: float64, or integers: what else is summed would depend on the number of ranks.
        device: for the sum.
    """
    return _reduced(tensor, device, dist.ReduceOp.SUM, 0) if size() > 1 else tensor


def lowest(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """Element by element over ranks, of floats; None counts for nothing."""
    return _reduced(tensor, device, dist.ReduceOp.MIN, float("inf")) if size() > 1 else tensor


def highest(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """Element by element over ranks, of floats; None counts for nothing."""
    return _reduced(tensor, device, dist.ReduceOp.MAX, float("-inf")) if size() > 1 else tensor


def _reduced(tensor: Tensor | None, device: torch.device, operation: Any, neutral: float) -> Tensor | None:
    known = next((k for k in gather(None if tensor is None else (tensor.shape, tensor.dtype)) if k is not None), None)
    if known is None:
        return None
    own = torch.full(known[0], neutral, dtype=known[1], device=device) if tensor is None else tensor.contiguous()
    carried = _carried(own)
    dist.all_reduce(carried, operation)
    return carried.to(own.device)


def spread(own: Mapping[int, T], device: torch.device) -> Iterator[tuple[int, T]]:
    """What every rank made, to all: in the order of ranks, and of each one's mapping; what a rank made itself as it is.

    Args:
        own: by any number: anything that can be pickled, tensors in it too.
        device: of the tensors that come.
    """
    if size() == 1:
        yield from own.items()
        return
    packed = {key: _packed(value) for key, value in own.items()}
    heads: list[Head] = [(key, head, [(t.shape, t.dtype) for t in tensors]) for key, (head, tensors) in packed.items()]
    for rank, sent in enumerate(gather(heads)):
        for key, head, known in sent:
            mine = rank == number()
            tensors = packed[key][1] if mine else [torch.empty(s, dtype=d, device=device) for s, d in known]
            for place, tensor in enumerate(tensors):
                tensors[place] = _broadcast(tensor, rank)
            yield key, own[key] if mine else _unpacked(head, tensors)


def others(count: int, get: Callable[[int], T], device: torch.device) -> Iterator[tuple[int, T]]:
    """Of ``count`` things that ranks made in shares, what the others made; one at a time is on its way.

    Args:
        count: as for :func:`share`.
        get: one of this rank's own.
        device: of the tensors that come.
    """
    for rank in range(size() if size() > 1 else 0):
        for key in range(count * rank // size(), count * (rank + 1) // size()):
            for _, found in spread({key: get(key)} if rank == number() else {}, device):
                if rank != number():
                    yield key, found


def from_rank(tensor: Tensor, rank: int) -> Tensor:
    """A tensor as one rank has it, in place; all have one of the same shape and dtype."""
    found = tensor if size() == 1 else _broadcast(tensor, rank)
    return tensor if found.data_ptr() == tensor.data_ptr() else tensor.copy_(found)


def summed(tensor: Tensor, rank: int) -> Tensor:
    """The sum over ranks, on one of them; elsewhere of no use. At most two of the terms may be other than zero.

    Args:
        tensor: floats of any dtype; rounded once, as when two are added.
        rank: who gets it.
    """
    if size() == 1:
        return tensor
    carried = _carried(tensor.contiguous())
    if f"{carried.device.type}:gloo" in dist.get_backend_config():
        carried = carried.float()  # it knows no 16 bits
    dist.reduce(carried, rank)
    return carried.to(tensor.device, tensor.dtype)


def _broadcast(tensor: Tensor, rank: int) -> Tensor:
    """Bytes, so that any dtype will do."""
    if not tensor.numel():
        return tensor
    carried = _carried(tensor.contiguous())
    dist.broadcast(carried.reshape(-1).view(torch.uint8), rank)
    return carried.to(tensor.device)


def _carried(tensor: Tensor) -> Tensor:
    """On a device between which the group carries tensors."""
    return tensor if f"{tensor.device.type}:" in dist.get_backend_config() else tensor.cuda()


def _exchange(item: tuple[Exception | None, T]) -> list[tuple[Exception | None, T]]:
    found: list[Any] = [None] * size()
    dist.all_gather_object(found, item)
    error = next((error for error, _ in found if error is not None), None)
    if error is not None and item[0] is None:
        _State.failed = True
        raise error
    return found


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        self.tensors.append(obj.detach())
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, pid: int) -> Tensor:
        return self.tensors[pid]


def _packed(value: object) -> tuple[bytes, list[Tensor]]:
    """Something without its tensors, and these."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    return file.getvalue(), pickler.tensors


def _unpacked(head: bytes, tensors: list[Tensor]) -> Any:
    return _Unpickler(io.BytesIO(head), tensors).load()
