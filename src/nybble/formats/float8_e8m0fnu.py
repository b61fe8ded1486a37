"""E8M0, the scale of the OCP MX formats: value 2**(code - 127), code 255 is NaN; no zero, sign or Inf."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nybble.formats._base import NumberFormat


@dataclass(frozen=True)
class ExponentFormat(NumberFormat):
    """Powers of two."""

    def decode_table(self) -> np.ndarray:  # noqa: D102
        return np.append(np.ldexp(1.0, np.arange(255) - 127), np.nan)


PART = ExponentFormat("float8_e8m0fnu", 8, aliases=("e8m0", "e8m0fnu"))
