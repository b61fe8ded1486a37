"""What a layer costs in a format: bytes, bits, operations, area. One cost a file.

A file defines ``PART``, a dataclass that is a :class:`Cost`; a search (:mod:`nybble.search`) holds a budget of one of
them. Other packages add costs through entry points of the group ``nybble.costs``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from nybble.core.registry import Registry
from nybble.quantizer import Quantizer

REGISTRY = Registry("nybble.costs", "cost", lambda part: isinstance(part, type) and issubclass(part, Cost))


Keep = Callable[[str, Callable[[], list[float]]], list[float]]
"""Numbers by a key: those that are known, or what the function measures, which are known from then on."""


@dataclass(frozen=True, kw_only=True)
class Sized:
    """A layer as far as costs go.

    Attributes:
        name: of the layer. shape: [out, in] of a matrix of it. matrices: how many it has (fused experts).
        macs: multiply-accumulates of one sample. inputs: the quantizer of what enters it; None: a 16-bit float.
        rows: of input that one call multiplies. linear: whether a call is one product of rows with a matrix.
    """

    name: str
    shape: tuple[int, int]
    matrices: int = 1
    macs: int = 0
    inputs: Quantizer | None = None
    rows: int = 1
    linear: bool = True

    @property
    def elements(self) -> int:
        """How many weights."""
        return self.matrices * self.shape[0] * self.shape[1]


@dataclass(frozen=True, kw_only=True)
class Cost(ABC):
    """What is paid for a layer's format, in whole units: sums are exact, and a budget is met or isn't.

    Attributes:
        unit: what a budget is given in, for messages. needs_macs: whether ``macs`` (and ``rows``) of layers have to be
            known. measured: whether :meth:`of` times this machine, so that numbers have to be kept.
    """

    registry: ClassVar[Any] = REGISTRY
    unit: ClassVar[str]
    needs_macs: ClassVar[bool] = False
    measured: ClassVar[bool] = False

    def here(self, device: str, keep: Keep) -> Cost:
        """The same on a device, with numbers that are kept; of costs that measure."""
        return self

    @abstractmethod
    def of(self, layer: Sized, weights: Quantizer) -> int:
        """What one layer costs with its weights in ``weights``."""

    def limit(self, budget: float, layers: Sequence[Sized]) -> int:
        """The most that all layers together may cost for a budget in :attr:`unit`."""
        return int(budget)

    def shown(self, total: int, layers: Sequence[Sized]) -> float:
        """A sum of costs in :attr:`unit`: the inverse of :meth:`limit`."""
        return total


def make_cost(name: str) -> Cost:
    """The cost called ``name``.

    Raises:
        UsageError: no such cost; the message has the closest one.
    """
    found: Cost = REGISTRY.make(name, {})
    return found
