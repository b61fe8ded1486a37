"""Binary: -1 and +1, sign(0) = +1; the scale is mean|w| (Rastegari et al. 2016, arXiv:1603.05279), ``scale=mean``.

Code 1 is +1; the one threshold is 0, whatever the tie rule, so that zero becomes +1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nybble.formats._base import NumberFormat
from nybble.rounding import get_rounding


@dataclass(frozen=True)
class BinaryFormat(NumberFormat):
    """Two values."""

    def decode_table(self) -> np.ndarray:  # noqa: D102
        return np.array([-1.0, 1.0])

    def thresholds(self, rounding: str = "nearest-even") -> np.ndarray:  # noqa: D102
        if get_rounding(rounding).tie_up is None:
            return super().thresholds(rounding)
        return np.zeros(1, dtype=np.float32)


PART = BinaryFormat("binary", 1)
