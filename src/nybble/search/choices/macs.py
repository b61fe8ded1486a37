"""Multiply-accumulates of networks of a space: each operation is counted once, on the meta device or any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nybble.nn.in_place import evaluation_mode
from nybble.search.choices.blocks import Choices, choices_of, choose


@torch.no_grad()
def macs(model: nn.Module, *inputs: Any) -> int:
    """Of one call: those of convolutions and linear layers, an output's size times the weights that make one of it."""
    found: list[int] = []

    def count(layer: Any, given: Any, output: torch.Tensor) -> None:
        found.append(output.numel() * layer.weight[0].numel())

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    try:
        with evaluation_mode(model):
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(found)


@dataclass(frozen=True)
class Table:
    """Of a space: ``fixed``, and each place's operations; a network has the sum."""

    fixed: int
    places: Sequence[Sequence[int]]

    def of(self, encoding: Sequence[int]) -> int:
        """Of one network."""
        return self.fixed + sum(place[number] for place, number in zip(self.places, encoding, strict=True))

    @property
    def least(self) -> int:
        """Of the smallest network."""
        return self.fixed + sum(map(min, self.places))

    @property
    def most(self) -> int:
        """Of the largest network."""
        return self.fixed + sum(map(max, self.places))


@torch.no_grad()
def table_of(model: nn.Module, example: torch.Tensor) -> Table:
    """Count a network of :class:`~nybble.search.choices.blocks.Choices`.

    Args:
        model: the network, on the meta device or any.
        example: one image, there, too.
    """
    places, seen = choices_of(model), list[tuple[Choices, torch.Tensor]]()
    hooks = [place.register_forward_pre_hook(lambda m, given: seen.append((m, given[0]))) for place in places]
    choose(model, [0] * len(places))
    whole = macs(model, example)
    for hook in hooks:
        hook.remove()
    inputs = {id(place): given for place, given in seen}
    found = [[macs(operation, inputs[id(place)]) for operation in place.operations] for place in places]
    return Table(whole - sum(place[0] for place in found), found)
