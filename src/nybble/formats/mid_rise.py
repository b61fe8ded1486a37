"""``midriseK``: 2**K evenly spaced values without a zero, -(2**K - 1) / 2 ... -0.5, 0.5 ... (2**K - 1) / 2.

StatsQ's grid of weights in few bits, ``midrise2 channel scale=max-entropy``: -3/4, -1/4, 1/4 and 3/4 of 2 mean|w| (OFQ,
Liu et al. 2023, arXiv:2302.02210; LLM-QAT's weights of 2 bits, Liu et al. 2023, arXiv:2305.17888).
"""

from __future__ import annotations

import re

from nybble.core.errors import FormatError
from nybble.formats._base import Family, TableFormat


def _build(match: re.Match[str]) -> TableFormat:
    bits = int(match[1])
    if not 2 <= bits <= 8:
        raise FormatError(f"{match[0]}: mid-rise grids have 2 to 8 bits; got {bits}. Of 1 bit there is 'binary'.")
    return TableFormat(match[0], bits, table=tuple(code + 0.5 - 2 ** (bits - 1) for code in range(2**bits)))


PART = Family(pattern=r"midrise(\d+)", build=_build, listed=("midrise2", "midrise3", "midrise4"))
