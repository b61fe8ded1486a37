"""A number format as a multiplier sees it: sign, factor and shift.

Every finite value is a whole number of *steps* of ``2**lsb``, ``(-1)^sign * (factor << shift)``. A floating-point
operand's factor is its significand; an integer's is its magnitude, so that all units multiply without signs (which on
LUTs takes half as much as two's complement does); any other format (DyBit, NF4, ternary) is looked up.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np

from nybble.core.errors import FormatError
from nybble.formats import NumberFormat
from nybble.formats.integer import IntFormat
from nybble.formats.minifloat import Minifloat

WIDEST_TABLE = 40
"""Bits of a fixed-point number that a table may hold; NF4's float32 values take 31."""


@dataclass(frozen=True)
class Operand:
    """One input of a unit.

    Attributes:
        format: of its codes.

    Raises:
        FormatError: a format that is neither integer nor floating point, and whose values need more bits than
            :data:`WIDEST_TABLE` in fixed point.
    """

    format: NumberFormat

    def __post_init__(self) -> None:
        if not isinstance(self.format, Minifloat | IntFormat) and self.factor_bits > WIDEST_TABLE:
            raise FormatError(
                f"{self.format.name}: a unit would need {self.factor_bits} bits to hold its values in fixed point "
                f"(at most {WIDEST_TABLE}); integers and eXmY floats have units of any width."
            )

    @cached_property
    def lsb(self) -> int:
        """Exponent of the step: every finite value is an integer times ``2**lsb``."""
        if isinstance(self.format, Minifloat):
            return self.format.emin - self.format.m
        common = 0
        for value in (Fraction(float(v)) for v in self.format.values if np.isfinite(v) and v):
            low = value.numerator & -value.numerator  # the lowest bit that is set
            common = min(common, low.bit_length() - value.denominator.bit_length())
        return common

    @cached_property
    def steps(self) -> tuple[int | None, ...]:
        """By code, the value in steps; None where the code is no number (NaN, Inf).

        The code that symmetric integers leave out (-8 of INT4) counts as 0: its magnitude would take one more bit.
        """
        unit = Fraction(2) ** self.lsb
        found = [int(Fraction(float(v)) / unit) if np.isfinite(v) else None for v in self.format.values]
        if isinstance(self.format, IntFormat):
            found = [step if step is not None and step >= self.format.low else 0 for step in found]
        return tuple(found)

    @property
    def numbers(self) -> tuple[int, ...]:
        """The steps that are numbers."""
        return tuple(step for step in self.steps if step is not None)

    @property
    def special_codes(self) -> tuple[int, ...]:
        """Codes that are no numbers."""
        return tuple(code for code, step in enumerate(self.steps) if step is None)

    @property
    def signed(self) -> bool:
        """Whether it can be negative."""
        return min(self.numbers) < 0

    @property
    def span(self) -> int:
        """Bits of the largest magnitude in steps."""
        return max(1, max(-min(self.numbers), *self.numbers).bit_length())

    @property
    def factor_bits(self) -> int:
        """Width of what goes into the multiplier."""
        return self.format.m + 1 if isinstance(self.format, Minifloat) else self.span

    @property
    def most_shift(self) -> int:
        """Largest shift of a float's significand; 0 of anything else."""
        return int(self.format.emax - self.format.emin) if isinstance(self.format, Minifloat) else 0
