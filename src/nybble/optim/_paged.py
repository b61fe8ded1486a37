"""Paged states: kept in the host's memory, brought to the parameter's device for its update and taken back behind it.

As in bitsandbytes (Dettmers et al. 2023, arXiv:2305.14314, section 3), but by explicit copies from and to pinned
buffers in place of managed memory: the copy of the next parameter's states runs beside an update, that of the last
one's too, and no more than three parameters' states are on the device at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from nybble.optim._states import each_tensor

LEAST = 100_000
"""Elements of a parameter from which on its states are paged; bitsandbytes' number."""

D = TypeVar("D", bound=tuple[Any, ...])
State = dict[str, Any]
Wait = Callable[[], None]


class Copies:
    """Copies that are done when they return; for devices without streams of copies."""

    def up(self, state: State, device: torch.device) -> tuple[State, Wait]:
        """A state's tensors on the device, and what to call before they are used."""
        return _moved(state, lambda t: t.to(device)), _nothing

    def down(self, state: State) -> tuple[State, Wait]:
        """A state's tensors in the host's memory, and what to call before they are read there."""
        return _moved(state, lambda t: t.cpu()), _nothing


class CudaCopies(Copies):
    """Copies on two streams of their own, one for each direction."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        stream: Any = torch.cuda.Stream
        self.into, self.out = stream(device), stream(device)

    def up(self, state: State, device: torch.device) -> tuple[State, Wait]:
        with torch.cuda.stream(self.into):
            there = _moved(state, lambda t: t.to(device, non_blocking=True))
            arrived = self.into.record_event()

        def ready() -> None:
            now = torch.cuda.current_stream(self.device)
            now.wait_event(arrived)
            _moved(there, lambda t: _used_on(t, now))

        return there, ready

    def down(self, state: State) -> tuple[State, Wait]:
        self.out.wait_stream(torch.cuda.current_stream(self.device))

        def copied(t: Tensor) -> Tensor:
            host = torch.empty(t.shape, dtype=t.dtype, pin_memory=True)
            return host.copy_(_used_on(t, self.out), non_blocking=True)

        with torch.cuda.stream(self.out):
            here = _moved(state, copied)
            return here, self.out.record_event().synchronize


def copies_for(device: torch.device) -> Copies:
    """Those of a type of device."""
    return CudaCopies(device) if device.type == "cuda" else Copies()


def is_paged(p: Tensor) -> bool:
    """Whether a parameter is large enough, and lives elsewhere than in the host's memory."""
    return p.numel() >= LEAST and p.device.type not in ("cpu", "meta")


def in_turn(
    due: Sequence[D], states: MutableMapping[Tensor, State], copies: Callable[[torch.device], Copies]
) -> Iterator[D]:
    """Each of ``due``, whose last item is a parameter, with its state on its device until the next one is asked for.

    Args:
        due: what to go through.
        states: by parameter; replaced, in the host's memory at the end, also where the caller stops early.
        copies: for a device.
    """
    leaving: deque[Wait] = deque()

    def bring(items: Sequence[D]) -> tuple[State, Wait]:
        if not items:
            return {}, _nothing
        p = items[0][-1]
        return copies(p.device).up(states[p], p.device)

    coming = bring(due[:1])
    try:
        for k, item in enumerate(due):
            if len(leaving) > 1:
                leaving.popleft()()  # or the host would run ahead, and all states be on the device at once
            p, (state, ready), coming = item[-1], coming, bring(due[k + 1 : k + 2])
            ready()
            states[p] = state
            del state, ready
            yield item
            states[p], left = copies(p.device).down(states[p])
            leaving.append(left)
    finally:
        for left in leaving:
            left()


def _moved(state: State, move: Callable[[Tensor], Tensor]) -> State:
    """All of a state but the number of steps, which the host counts."""
    return {name: kept if name == "step" else each_tensor(kept, move) for name, kept in state.items()}


def _used_on(t: Tensor, stream: torch.cuda.Stream) -> Tensor:
    """Its memory isn't given to others before the stream has come past here."""
    t.record_stream(stream)
    return t


def _nothing() -> None:
    pass
