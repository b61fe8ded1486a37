"""Bit operations of one sample: multiply-accumulates x bits of the weight x bits of the input (HAWQ-V3, FLIQS).

Yao et al. 2021, arXiv:2011.10680, section 3.3: ``BOPS = MACs * b_w * b_a``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nybble.costs import Cost, Sized
from nybble.quantizer import Quantizer

FLOAT_BITS = 16
"""Of an input that nothing quantizes: models run in bfloat16."""


@dataclass(frozen=True, kw_only=True)
class Bops(Cost):
    """Of the searched layers' own products, counted in a forward of one calibration sample."""

    unit: ClassVar[str] = "bit operations of a sample"
    needs_macs: ClassVar[bool] = True

    def of(self, layer: Sized, weights: Quantizer) -> int:  # noqa: D102
        bits = FLOAT_BITS if layer.inputs is None else layer.inputs.format.bits
        return layer.macs * weights.format.bits * bits


PART = Bops
