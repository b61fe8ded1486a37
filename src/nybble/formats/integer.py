"""INT 1-8: two's complement ``int4`` (symmetric: -8 unused), ``int4_full`` (all codes), and unsigned ``uint4``.

``int4`` under ``symmetric=false`` means ``int4_full`` with an integer zero point. Values are integers, codes the bit
patterns; ``x_hat = scale * (value - zero_point)`` (Jacob et al. 2018, arXiv:1712.05877, eq. 1).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from nybble.core.errors import FormatError
from nybble.formats._base import Family, NumberFormat


@dataclass(frozen=True)
class IntFormat(NumberFormat):
    """Evenly spaced integers ``low .. high``."""

    is_signed: bool = True
    full_range: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise FormatError(f"{self.name}: integers have 1 to 8 bits; got {self.bits}.")
        if self.bits == 1 and self.is_signed and not self.full_range:
            raise FormatError(
                "int1 has only the value 0 when symmetric. Use 'binary' (-1, +1), 'uint1' or 'int1_full'."
            )

    @property
    def low(self) -> int:
        """Smallest integer that an encoder produces."""
        if not self.is_signed:
            return 0
        return (0 if self.full_range else 1) - (1 << self.bits - 1)

    @property
    def high(self) -> int:
        """Largest integer."""
        return (1 << self.bits - self.is_signed) - 1

    @property
    def is_integer(self) -> bool:  # noqa: D102
        return True

    @property
    def exponent_bits(self) -> int:
        """Integers are floats of one exponent bit: INT4's values are those of E1M2 (subnormals and one binade)."""
        return 1

    def decode_table(self) -> np.ndarray:  # noqa: D102
        codes = np.arange(2**self.bits)
        return codes - np.where(self.is_signed & (codes >= 2 ** (self.bits - 1)), 2**self.bits, 0)

    def encodable(self) -> np.ndarray:  # noqa: D102
        return np.asarray(self.values >= self.low)


def _build(match: re.Match[str]) -> IntFormat:
    unsigned, bits, full = match.groups()
    if unsigned and full:
        raise FormatError(
            f"{match[0]}: unsigned integers always use their full range; write {match[0].removesuffix('_full')}."
        )
    return IntFormat(name=match[0], bits=int(bits), is_signed=not unsigned, full_range=bool(full))


PART = Family(
    pattern=r"(u)?int(\d+)(_full)?",
    build=_build,
    listed=(
        *(f"int{b}" for b in range(2, 9)),
        *(f"int{b}_full" for b in range(1, 9)),
        *(f"uint{b}" for b in range(1, 9)),
    ),
)
