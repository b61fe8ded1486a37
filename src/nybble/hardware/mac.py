"""A multiply-accumulate unit with an exact sum: what it computes, and how wide it is.

Codes go in, products are kept in fixed point, and the sum loses nothing for as long as a dot product has no more than
``length`` terms (a Kulisch accumulator; Kulisch 2013, "Computer Arithmetic and Validity"). The unit of Aggarwal et al.
2023, arXiv:2311.12359, whose widths for dot products of n terms are

    integers of r bits       r_w + r_x + ceil(log2 n) + 1
    floats of e and m bits   2^e_w + m_w + 2^e_x + m_x + ceil(log2 n) - 1

The first is two bits wider than symmetric integers need. ``accumulator="exact"`` takes the narrowest two's complement
number that holds every sum of ``length`` products, for all formats alike; ``"stated"`` the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from nybble.core.errors import DataError, UsageError
from nybble.formats import NumberFormat
from nybble.formats.integer import IntFormat
from nybble.formats.minifloat import Minifloat
from nybble.hardware.operand import Operand

LONGEST = 4608
"""The longest dot product of ResNet-18 (512 channels of 3 x 3), which the paper's widths are for."""


@dataclass(frozen=True, kw_only=True)
class MacUnit:
    """``sum += w * x``, exactly.

    Attributes:
        weights, inputs: formats of the codes that go in.
        length: terms of the longest dot product that the sum has to hold.
        accumulator: how wide the sum is, see the module.

    Raises:
        FormatError: a format that no unit takes (:class:`~nybble.hardware.operand.Operand`).
        UsageError: a length below 1.
    """

    weights: NumberFormat
    inputs: NumberFormat
    length: int = LONGEST
    accumulator: Literal["exact", "stated"] = "exact"

    def __post_init__(self) -> None:
        if self.length < 1:
            raise UsageError(f"length={self.length}: a dot product has at least one term.")
        if self.accumulator not in ("exact", "stated"):
            raise UsageError(f"accumulator={self.accumulator!r} is neither 'exact' nor 'stated'.")
        assert self.operands  # refuses formats that no unit takes

    @cached_property
    def operands(self) -> tuple[Operand, Operand]:
        """The two inputs as the multiplier sees them."""
        return Operand(self.weights), Operand(self.inputs)

    @property
    def lsb(self) -> int:
        """The sum is in steps of ``2**lsb``."""
        w, x = self.operands
        return w.lsb + x.lsb

    @property
    def name(self) -> str:
        """Name of the module in Verilog."""
        return "mac_" + "_".join(fmt.name.replace("-", "m") for fmt in (self.weights, self.inputs))

    @property
    def product_bits(self) -> int:
        """Bits of the largest product's magnitude in steps."""
        w, x = self.operands
        return max(1, max(abs(a * b) for a in _extremes(w) for b in _extremes(x)).bit_length())

    @property
    def exact_bits(self) -> int:
        """The narrowest two's complement number that holds any sum of ``length`` products."""
        w, x = self.operands
        products = [a * b for a in _extremes(w) for b in _extremes(x)]
        high, low = self.length * max(*products, 0), self.length * min(*products, 0)
        return max(high.bit_length(), (-low - 1).bit_length() if low else 0) + 1

    @property
    def stated_bits(self) -> int:
        """The paper's width (see the module).

        An integer beside a float counts as r - 1 bits of magnitude (r if unsigned), from which the paper's own formula
        for floats follows too.

        Raises:
            UsageError: of a format that is neither integer nor floating point the paper says nothing.
        """
        extra = (self.length - 1).bit_length()
        if isinstance(self.weights, IntFormat) and isinstance(self.inputs, IntFormat):
            return self.weights.bits + self.inputs.bits + extra + 1
        return sum(_span(fmt) for fmt in (self.weights, self.inputs)) + extra + 1

    @property
    def bits(self) -> int:
        """Width of the sum."""
        return self.exact_bits if self.accumulator == "exact" else self.stated_bits

    def product(self, w: int, x: int) -> int | None:
        """The product of two codes in steps; None where one of them is no number."""
        a, b = self.operands[0].steps[w], self.operands[1].steps[x]
        return None if a is None or b is None else a * b

    def sums(self, w: Sequence[int], x: Sequence[int]) -> list[tuple[int, bool]]:
        """The unit, term by term.

        Args:
            w: codes of weights.
            x: codes of inputs, as many.

        Returns:
            After each term the sum in steps, as a two's complement number of :attr:`bits` that wraps; and whether a
            code that is no number came: it adds nothing and is remembered.
        """
        if len(w) != len(x):
            raise DataError(f"{len(w)} weights and {len(x)} inputs: a dot product has as many of both.")
        total, invalid, found = 0, False, []
        half, whole = 1 << self.bits - 1, 1 << self.bits
        for a, b in zip(w, x, strict=True):
            term = self.product(a, b)
            invalid = invalid or term is None
            total = (total + (term or 0) + half) % whole - half
            found.append((total, invalid))
        return found

    def value(self, total: int) -> float:
        """A sum in the units of the formats' values."""
        return float(total) * 2.0**self.lsb


def _extremes(operand: Operand) -> tuple[int, int]:
    return min(operand.numbers), max(operand.numbers)


def _span(fmt: NumberFormat) -> int:
    """Magnitude bits in fixed point, by the widths of a format's fields alone."""
    if isinstance(fmt, Minifloat):
        return int(2**fmt.e + fmt.m - 1)
    if isinstance(fmt, IntFormat):
        return fmt.bits - fmt.is_signed
    raise UsageError(
        f"{fmt.name}: the paper states widths of integers and eXmY floats; use accumulator='exact' for others."
    )
