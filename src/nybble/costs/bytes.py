"""Bytes of the weights in a file: codes, scales, offsets and padding, as ``nybble inspect`` counts a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nybble.costs import Cost, Sized
from nybble.quantizer import Quantizer


@dataclass(frozen=True, kw_only=True)
class Bytes(Cost):
    """Of the searched layers alone; what stays in float, headers and configs come on top."""

    unit: ClassVar[str] = "bytes"

    def of(self, layer: Sized, weights: Quantizer) -> int:  # noqa: D102
        return layer.matrices * int(weights.stored_bytes(layer.shape))


PART = Bytes
