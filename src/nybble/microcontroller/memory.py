"""Memory of a training step: elements by layer and step, and every array that the C declares."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import prod

import torch

from nybble.core.errors import UsageError
from nybble.microcontroller.stack import Plan, Stack, plan


@dataclass(frozen=True, kw_only=True)
class Array:
    """An array of the C.

    Attributes:
        name: as C has it. count: elements. element: ``elem`` (the 16-bit type), ``float`` or ``uint8_t``.
        use: what is in it.
    """

    name: str
    count: int
    element: str
    use: str


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What a training step needs.

    Attributes:
        bytes_each: of an element. layers: name -> elements of the forward step, weight gradient, input gradient, where
            the plan has them. arrays: that stay for the whole step; code and the input as it comes are not in it.
    """

    bytes_each: int
    layers: dict[str, tuple[int, int, int]]
    arrays: tuple[Array, ...]

    @property
    def bytes(self) -> int:
        """Of all arrays."""
        return sum(size_of(array, self.bytes_each) for array in self.arrays)

    def table(self) -> str:
        """Bytes by layer and step, a line each."""
        head = f"{'layer':32} {'forward':>10} {'weight':>10} {'input':>10}   bytes"
        rows = (
            f"{n[-32:]:32} " + " ".join(f"{e * self.bytes_each:10,}" for e in row) for n, row in self.layers.items()
        )
        return "\n".join((head, *rows))

    def refuse_above(self, limit: int) -> None:
        """Raise UsageError, with the table, where all arrays together have more than ``limit`` bytes."""
        if self.bytes <= limit:
            return
        uses: dict[str, int] = {}
        for array in self.arrays:
            uses[array.use] = uses.get(array.use, 0) + size_of(array, self.bytes_each)
        parts = ", ".join(f"{use} {size:,}" for use, size in uses.items())
        raise UsageError(
            f"a training step needs {self.bytes:,} bytes ({parts}); the limit is {limit:,}. Train fewer layers "
            f"(update), or make the network smaller.\n{self.table()}"
        )


def size_of(array: Array, bytes_each: int) -> int:
    """Bytes of an array, where an ``elem`` has ``bytes_each``."""
    return array.count * {"elem": bytes_each, "float": 4, "uint8_t": 1}[array.element]


def memory(stack: Stack, dtype: torch.dtype, update: Collection[str] | None = None) -> Memory:
    """What a step of a stack needs in a type, where only ``update`` learns; errors as of ``plan``."""
    planned = plan(stack, update)
    layers = {}
    for layer in stack.layers:
        forward, weight, back = layer.elements()
        needed = (True, layer.name in planned.updated, bool(planned.carried.intersection(layer.inputs)))
        layers[layer.name] = tuple(e if n else 0 for e, n in zip((forward, weight, back), needed, strict=True))
    return Memory(bytes_each=dtype.itemsize, layers=layers, arrays=tuple(_arrays(stack, planned)))  # type: ignore[arg-type]


def _arrays(stack: Stack, planned: Plan) -> list[Array]:
    def made(name: str, count: int, use: str, element: str = "elem") -> None:
        if count:
            found.append(Array(name=name, count=count, element=element, use=use))

    found: list[Array] = []
    for layer in stack.learned:
        for role, shape in layer.parameters.items():
            made(layer.parameter(role), prod(shape), "weights")
            if layer.name in planned.updated:
                made(layer.parameter(role, True), prod(shape), "gradients of weights")
    for number, shape in enumerate(stack.shapes):
        made(f"t{number}", prod(shape), "activations")
        made(f"g{number}", prod(shape) if number in planned.carried else 0, "gradients of activations")
    for layer in stack.layers:
        made(f"{layer.id}_own", layer.own_bytes, "places of largest", "uint8_t")
    back = [layer for layer in planned.backward if planned.carried.intersection(layer.inputs)]
    made("columns", max([*(n.columns(False) for n in stack.layers), *(n.columns(True) for n in back)]), "im2row")
    made("turned", max((layer.turned for layer in back), default=0), "transposed weights")
    made("scratch", max((prod(stack.shapes[n]) for n in summed(planned)), default=0), "sums of gradients")
    made("powers", stack.outputs, "loss", "float")
    return found


def summed(planned: Plan) -> list[int]:
    """Tensors that several layers read, whose gradients are added."""
    read = [n for layer in planned.backward for n in layer.inputs if n in planned.carried]
    return sorted({n for n in read if read.count(n) > 1})
