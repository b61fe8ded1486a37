"""A network as layers in order, with its weights; and what of it a sparse update trains."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

from torch import Tensor

from nybble.core.errors import UsageError, did_you_mean
from nybble.microcontroller.layer import Layer, Shape


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A network.

    Attributes:
        layers: in the order in which they are computed; tensor 0 is the input.
        shapes: of the tensors, of one sample.
        weights: layer -> role -> float32 values; on the meta device where nothing was read yet.
    """

    layers: tuple[Layer, ...]
    shapes: tuple[Shape, ...]
    weights: Mapping[str, Mapping[str, Tensor]]

    @property
    def output(self) -> int:
        """Number of the tensor that is the network's output."""
        return self.layers[-1].output

    @property
    def outputs(self) -> int:
        """Elements of it."""
        return prod(self.shapes[self.output])

    @property
    def learned(self) -> list[Layer]:
        """Layers that have parameters."""
        return [layer for layer in self.layers if layer.parameters]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a training step has to compute.

    Attributes:
        updated: names of layers whose parameters are trained.
        carried: numbers of tensors whose gradient is needed.
        backward: layers that the backward step visits, last first.
    """

    updated: frozenset[str]
    carried: frozenset[int]
    backward: tuple[Layer, ...]


def plan(stack: Stack, update: Collection[str] | None = None) -> Plan:
    """What a step computes where only some layers learn: the backward step stops below the first of them.

    Args:
        stack: the network.
        update: names of layers, or patterns with ``*``; None trains all.

    Raises:
        UsageError: a name that no layer with parameters has; nothing to train.
    """
    names = [layer.name for layer in stack.learned]
    for wanted in update or ():
        if not any(fnmatchcase(name, wanted) for name in names):
            raise UsageError(f"no layer with parameters is called {wanted!r}.{did_you_mean(wanted, names)}")
    updated = frozenset(n for n in names if update is None or any(fnmatchcase(n, wanted) for wanted in update))
    if not updated:
        raise UsageError("no layer is trained; name one at least, or leave update out to train all.")
    carried: set[int] = set()
    for layer in stack.layers:
        if layer.name in updated or carried.intersection(layer.inputs):
            carried.add(layer.output)
    if stack.output not in carried:
        raise UsageError(f"none of the layers {', '.join(sorted(updated))} reaches the output.")
    backward = tuple(layer for layer in reversed(stack.layers) if layer.output in carried)
    return Plan(updated=updated, carried=frozenset(carried), backward=backward)


def multiply_adds(stack: Stack, planned: Plan) -> dict[str, tuple[int, int, int]]:
    """Of matrix products by layer: forward, weight gradient, input gradient, each 0 where a plan leaves it out."""
    found = {}
    for layer in stack.layers:
        forward, weight, back = layer.products
        carried = planned.carried.intersection(layer.inputs)
        found[layer.name] = (forward, weight if layer.name in planned.updated else 0, back if carried else 0)
    return found
