"""The LUTs of a multiply-accumulate unit, estimated from the widths of its parts.

A unit with an exact sum (:mod:`nybble.hardware`) has a multiplier, a shifter, an adder as wide as the sum, and what
takes codes apart. Each part's LUTs go with a count of bits::

    multiplier   factor bits of one x factor bits of the other; none where one has a single bit
    its tree     the same x bits of the narrower factor above 3 (up to 3 x 3, each bit of a product is one LUT)
    shifter      bits of the product x stages (the bits of the shift)
    adder        bits of the sum
    decoder      bits of a float's code, twice where it has NaN; of an integer's twice (its magnitude); of a table's
                 2^bits x bits of the entry / 64

with coefficients that are fitted to units that Yosys mapped (benchmarks/hardware/mac.py -> benchmarks/results/mac.json;
a test holds them to that table). It is Yosys's mapping to UltraScale+ without multiplier blocks and before placement;
for one pair of formats that matters, map it (``nybble mac ... --synthesize``).

The paper that asks the question (Aggarwal et al. 2023, arXiv:2311.12359) counts LUTs of its own units after
implementation on a Versal device. Numbers here are other numbers, for the same comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from nybble.costs import Cost, Sized
from nybble.formats import get_format
from nybble.formats.integer import IntFormat
from nybble.formats.minifloat import Minifloat
from nybble.hardware.mac import MacUnit
from nybble.hardware.operand import Operand
from nybble.quantizer import Quantizer

NAMES = ("multiplier", "its tree", "shifter", "adder", "decoder")
COEFFICIENTS = (1.04, 0.196, 0.23, 1.084, 0.22)
"""LUTs per unit of each of :data:`NAMES`, fitted by relative error: 6 % off on average, 17 % at most."""


def features(unit: MacUnit) -> tuple[float, ...]:
    """What the estimate counts, in the order of :data:`NAMES`."""
    w, x = unit.operands
    stages = (w.most_shift + x.most_shift).bit_length()
    narrow = min(w.factor_bits, x.factor_bits)
    multiplier = w.factor_bits * x.factor_bits if narrow > 1 else 0
    tree = multiplier * max(0, narrow - 3)
    return (multiplier, tree, unit.product_bits * stages, unit.bits, _decoder(w) + _decoder(x))


def _decoder(operand: Operand) -> float:
    fmt = operand.format
    if isinstance(fmt, IntFormat):
        return 2.0 * fmt.bits if operand.signed else 0.0
    if isinstance(fmt, Minifloat):
        return float(fmt.bits + (fmt.bits if operand.special_codes else 0)) if fmt.e > 1 else 0.0
    return 2.0**fmt.bits * operand.factor_bits / 64


def luts(unit: MacUnit) -> float:
    """About how many six-input LUTs a unit takes.

    >>> from nybble.formats import get_format
    >>> int4, e2m1 = (MacUnit(weights=fmt, inputs=fmt) for fmt in (get_format("int4"), get_format("e2m1")))
    >>> luts(int4) < luts(e2m1)
    True
    """
    return float(np.dot(COEFFICIENTS, features(unit)))


def fitted(rows: Sequence[tuple[Sequence[float], float]]) -> tuple[float, ...]:
    """Coefficients for mapped units: least squares of the relative error.

    Args:
        rows: what :func:`features` gives of each, and its LUTs.
    """
    counts = np.array([row[1] for row in rows], np.float64)
    matrix = np.array([row[0] for row in rows], np.float64) / counts[:, None]
    found = np.linalg.lstsq(matrix, np.ones(len(rows)), rcond=None)[0]
    return tuple(round(float(c), 3) for c in found)


@dataclass(frozen=True, kw_only=True)
class MacArea(Cost):
    """LUTs x multiply-accumulates of a sample, as if each layer had units of its own formats.

    Attributes:
        inputs: the format of inputs that nothing quantizes: no unit has an exact sum of 16-bit floats.
    """

    inputs: str = "int8"
    unit: ClassVar[str] = "LUTs x multiply-accumulates of a sample"
    needs_macs: ClassVar[bool] = True

    def of(self, layer: Sized, weights: Quantizer) -> int:  # noqa: D102
        inputs = get_format(self.inputs) if layer.inputs is None else layer.inputs.format
        return round(layer.macs * luts(MacUnit(weights=weights.format, inputs=inputs)))


PART = MacArea
