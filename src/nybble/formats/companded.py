"""``compandedK`` and ``ucompandedK``: equal steps of a compressed value, so finer towards 0.

Signed: equal steps of 2x / (1 + |x|), so the values are y / (2 - |y|) for 2**K - 1 equally spaced y of [-1, 1]:
around 0 half a uniform step, at 1 two. Unsigned: equal steps of the square root, which is what a second moment is
needed for, and no 0: y**2 for y = 2**-K, 2 * 2**-K ... 1. The curves are FlashOptim's (Gonzalez Ortiz et al. 2026,
arXiv:2602.23349); as in all tables here a code is the nearest value, not the nearest step, and unlike theirs the
unsigned one has no zero, for the reason of Li et al. 2023 (arXiv:2309.01507, section 4.1).
"""

from __future__ import annotations

import re

import numpy as np

from nybble.core.errors import FormatError
from nybble.formats._base import Family, TableFormat


def _build(match: re.Match[str]) -> TableFormat:
    bits = int(match[2])
    if not 2 <= bits <= 8:
        raise FormatError(f"{match[0]}: companded maps have 2 to 8 bits; got {bits}.")
    if match[1]:
        values = (np.arange(1, 2**bits + 1) / 2**bits) ** 2
    else:
        steps = np.arange(1 - 2 ** (bits - 1), 2 ** (bits - 1)) / (2 ** (bits - 1) - 1)
        values = np.append(steps / (2 - np.abs(steps)), 1.0)  # the last code has the largest value once more
    return TableFormat(match[0], bits, table=tuple(float(np.float32(v)) for v in values))


PART = Family(pattern=r"(u)?companded(\d+)", build=_build, listed=("companded8", "ucompanded8"))
