"""Transforms that a gradient moves: a block computes the same in float, and its layers have other numbers to round.

A part of :mod:`nybble.learned` stands where one tensor is rounded. A learned transform stands in front of all of them:
the weights and biases that a block's layers round are a function of the float ones and of what is learned::

    part = make_learned_transform("let", {})
    moving = part.begin(places, extents)  # of one block
    new = moving.rewritten(weights)  # float32 tensors by name, with gradients to moving's parameters

A *place* is where channels may be rescaled without a change in float (:func:`nybble.calibration.folds.places_of` finds
them); its function is applied to the weights in the order of places. When a block is done the same functions rewrite
the float weights themselves, so that nothing of the transform is left at run time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from nybble.core.registry import Registry
from nybble.core.shapes import Float32, Int64

REGISTRY = Registry(
    "nybble.learned.transforms",
    "learned transform",
    lambda part: isinstance(part, type) and issubclass(part, LearnedTransform),
)
Function = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], dict[str, Tensor]]
"""(weights, parameters) -> the weights that changed, float32; differentiable in both."""


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Heads of an attention, inside of which the channels of values may also be rotated.

    Attributes:
        count: how many rotations there are: of values, of which several heads of queries may read one.
        width: channels of each.
        function: of the place's weights, with the parameter ``rotation``, float32 [count, width, width], orthogonal.
        turned: activations [..., channels] and rotations -> what the layer that reads them gets in their place.
    """

    count: int
    width: int
    function: Function
    turned: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Channels of a block between what makes and what reads them.

    Attributes:
        name: of what makes them and of what reads them first, ``input_layernorm -> self_attn.q_proj``.
        kind: what makes them: a ``norm``; ``attention`` (values, on their way to the output layer); a ``linear`` layer
            in front of another; of a ``product`` both queries and keys, whose factors are each other's inverse.
        makers, readers: names of the layers. of a product the queries' and the keys'.
        weights: full names in the block of what :attr:`function` reads.
        function: with the parameter ``factor``, float32 [channels], positive: channels are divided by it where they
            are made and multiplied where they are read; with ``shift``, float32 [channels], it is subtracted before.
        units: which of the free factors each channel has; int64 [channels], from 0 up. Channels that one row makes for
            several readers, or that a rotation mixes, share one.
        shifts: whether they may be shifted: all that makes and reads them has a bias.
        rounded: whether the scheme rounds them. static: with a range that was fixed before.
        heads: of ``attention``, how its channels are rotated.
    """

    name: str
    kind: Literal["norm", "attention", "linear", "product"]
    makers: tuple[str, ...]
    readers: tuple[str, ...]
    weights: tuple[str, ...]
    function: Function
    units: Int64[Tensor, " channels"]
    shifts: bool = False
    rounded: bool = False
    static: bool = False
    heads: Heads | None = None


@dataclass(frozen=True, kw_only=True)
class Extent:
    """What calibration and the weights say of a place's channels: float32 [channels] each.

    Attributes:
        lowest, highest: of the float network's activations.
        behind: largest magnitude among the weights that read each channel.
    """

    lowest: Float32[Tensor, " channels"]
    highest: Float32[Tensor, " channels"]
    behind: Float32[Tensor, " channels"]


class Moving(nn.Module, ABC):
    """The learned transform of one block; everything in it is float32.

    Args:
        places: in the order in which they are applied.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        super().__init__()
        self.places = tuple(places)

    @abstractmethod
    def parameters_of(self, number: int) -> dict[str, Tensor]:
        """What the function of a place is given, with gradients."""

    @abstractmethod
    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by learning-rate group; the groups are those that the part names."""

    def rewritten(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that change, as they are now.

        Args:
            weights: the block's own, float32, by name: those that the places read.
        """
        found: dict[str, Tensor] = {}
        device = next(iter(weights.values())).device.type if weights else "cpu"
        with torch.autocast(device, enabled=False):
            for number, place in enumerate(self.places):
                given = {name: found[name] if name in found else weights[name] for name in place.weights}
                found |= self.function_of(place)(given, self.parameters_of(number))
        return found

    def function_of(self, place: Place) -> Function:
        """What its parameters are given to: the place's own, which rescales, or another that it offers."""
        return place.function

    def told(self, names: Sequence[str]) -> str:
        """Some of its places in words, with what is done there."""
        return ", ".join(names)

    def inputs(self, layer: str, x: Tensor) -> Tensor:
        """What a layer gets in place of ``x``, float32 [..., channels], as the transform is now; no gradient."""
        for number, place in enumerate(self.places):
            if layer in place.readers and place.kind != "product":
                given = {name: value.detach() for name, value in self.parameters_of(number).items()}
                x = self.turned(place, x, given)
        return x

    def turned(self, place: Place, x: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        """What is read at a place in place of ``x``, float32 [..., channels], under these parameters."""
        return (x - given["shift"] if "shift" in given else x) / given["factor"]

    @property
    def touched(self) -> frozenset[str]:
        """Names of all that makes or reads channels of its places."""
        return frozenset(name for place in self.places for name in (*place.makers, *place.readers))


class LearnedTransform(ABC):
    """The options of a kind of Moving: subclasses are frozen keyword-only dataclasses.

    Attributes:
        groups: names of its learning-rate groups.
        inside_heads: whether it works inside the heads of attention alone.
        registry: where parts are found by name, for options that name one.
    """

    groups: ClassVar[tuple[str, ...]] = ()
    inside_heads: ClassVar[bool] = False
    registry: ClassVar[Registry] = REGISTRY

    @abstractmethod
    def takes(self, place: Place) -> bool:
        """Whether it works on a place."""

    def check_heads(self, width: int) -> None:  # noqa: B027  (most don't look at heads)
        """Raise SchemeError where it can't work inside heads of so many channels."""

    @abstractmethod
    def begin(self, places: Sequence[Place], extents: Sequence[Extent | None] | None) -> Moving:
        """What it learns of one block.

        Args:
            places: those that it takes.
            extents: of each place (None of products); None in all: everything comes from a state dict.
        """


def make_learned_transform(name: str, options: Mapping[str, Any]) -> LearnedTransform:
    """A learned transform by name.

    Raises:
        UsageError: no such part. SchemeError: an unknown option, or a value of the wrong type.
    """
    part: LearnedTransform = REGISTRY.make(name, options)
    return part
