"""``linearK``: the unsigned map (i + 1) / 2**K without a zero, for optimizers' second moments.

Li et al. 2023, arXiv:2309.01507.
"""

from __future__ import annotations

import re

from nybble.core.errors import FormatError
from nybble.formats._base import Family, TableFormat


def _build(match: re.Match[str]) -> TableFormat:
    bits = int(match[1])
    if not 1 <= bits <= 8:
        raise FormatError(f"{match[0]}: linear maps have 1 to 8 bits; got {bits}.")
    return TableFormat(match[0], bits, table=tuple((i + 1) / 2**bits for i in range(2**bits)))


PART = Family(pattern=r"linear(\d+)", build=_build, listed=("linear4", "linear8"))
