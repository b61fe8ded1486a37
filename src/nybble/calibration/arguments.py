"""What blocks are called with beside their hidden states: held once where batches have it in common."""

from __future__ import annotations

import copy
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nybble.calibration.trace import BlockCall

_PLAIN = (Tensor, str, int, float, bool, torch.dtype, torch.device, type(None))


class Held:
    """Tensors that the blocks of an earlier batch were called with, to be held instead of equal ones.

    Most models compute theirs of positions alone, a few (Gemma 4, Zamba) of the tokens too.
    """

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []

    def shared(self, calls: Sequence[BlockCall]) -> list[BlockCall]:
        """The calls with tensors of the batch that came first, each where its own at that place is the same."""
        known, place, first = self._tensors, 0, not self._tensors

        def held(tensor: Tensor) -> Tensor:
            nonlocal place
            if first:
                known.append(tensor)
            place += 1
            return known[place - 1] if place <= len(known) and _same(known[place - 1], tensor) else tensor

        return mapped_calls(calls, held)


def own(calls: Sequence[BlockCall]) -> list[BlockCall]:
    """The calls with lists and mappings of their own: blocks may write into them what later ones read (Gemma 4)."""
    return mapped_calls(calls, lambda tensor: tensor)


def keeps(call: BlockCall) -> bool:
    """Whether a block is called with lists, mappings or objects, into which it may write what later ones read."""
    given = [*call.args, *call.kwargs.values()]
    while given:
        value = given.pop()
        if isinstance(value, tuple):
            given += value
        elif not isinstance(value, _PLAIN):
            return True
    return False


def mapped_calls(calls: Sequence[BlockCall], change: Callable[[Tensor], Tensor]) -> list[BlockCall]:
    """The calls with every tensor among their arguments changed, in containers of their own."""
    seen: dict[int, tuple[Any, Any]] = {}
    return [
        replace(
            call,
            args=_mapped(call.args, change, seen),
            kwargs=_mapped(dict(call.kwargs), change, seen),
            mask=_mapped(call.mask, change, seen),
        )
        for call in calls
    ]


def _mapped(value: Any, change: Callable[[Tensor], Tensor], seen: dict[int, tuple[Any, Any]]) -> Any:
    """A copy of nested containers with other tensors; what is one object in several places stays one."""
    if id(value) in seen:
        return seen[id(value)][1]
    made = value
    if isinstance(value, Tensor):
        made = change(value)
    elif isinstance(value, tuple):
        items = [_mapped(item, change, seen) for item in value]
        made = type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    elif isinstance(value, list):
        made = [_mapped(item, change, seen) for item in value]
    elif isinstance(value, MutableMapping):
        made = copy.copy(value)
        for key, item in value.items():
            made[key] = _mapped(item, change, seen)
    seen[id(value)] = value, made  # with the value: another could get the address of one that is freed
    return made


def _same(one: Tensor, other: Tensor) -> bool:
    alike = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
    return one is other or (alike and torch.equal(one, other))
