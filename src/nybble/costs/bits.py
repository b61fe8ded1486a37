"""Mean bits of the codes, over the weights of all searched layers (scales come on top: ``bytes`` has them)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from nybble.costs import Cost, Sized
from nybble.quantizer import Quantizer


@dataclass(frozen=True, kw_only=True)
class Bits(Cost):
    """A budget of 4.0 is what uniform ``int4`` takes, in groups of any size."""

    unit: ClassVar[str] = "mean bits of a weight"

    def of(self, layer: Sized, weights: Quantizer) -> int:  # noqa: D102
        return layer.elements * weights.format.bits

    def limit(self, budget: float, layers: Sequence[Sized]) -> int:  # noqa: D102
        # The last bit of a decimal budget (3.1) must not cost a layer its format.
        return math.floor(round(budget * sum(layer.elements for layer in layers), 3))

    def shown(self, total: int, layers: Sequence[Sized]) -> float:  # noqa: D102
        return total / max(1, sum(layer.elements for layer in layers))


PART = Bits
