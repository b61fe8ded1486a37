"""DyBit: the exponent in unary (leading ones), the rest mantissa; linear below 1, order preserving.

Zhou et al. 2023, arXiv:2302.12510.

For n magnitude bits and i leading ones: i = 0 gives m / 2**(n - 1); 1 <= i < n gives 2**(i - 1) * (1 + m / 2**k) with
k = n - 1 - i; all ones give 2**(n - 1). ``dybit4`` has a sign and n = 3, ``udybit4`` no sign and n = 4. The encoding is
recalled from the paper, not copied: the tables of tests/ are the specification that the tests hold it to.
"""

from __future__ import annotations

import math
import re

from nybble.core.errors import FormatError
from nybble.formats._base import Family, TableFormat


def dybit_magnitude(code: int, n: int) -> float:
    """Value of the ``n``-bit magnitude ``code``, read bit by bit."""
    ones = 0
    while ones < n and code >> (n - 1 - ones) & 1:
        ones += 1
    if ones == n:
        return 2.0 ** (n - 1)
    k = n - 1 - ones
    mantissa = code & (2**k - 1)
    if ones == 0:
        return math.ldexp(mantissa, 1 - n)
    return math.ldexp(1 + math.ldexp(mantissa, -k), ones - 1)


def _build(match: re.Match[str]) -> TableFormat:
    unsigned, bits = match[1], int(match[2])
    n = bits if unsigned else bits - 1
    if n < 1 or bits > 8:
        least = 1 if unsigned else 2
        raise FormatError(
            f"{match[0]}: {'unsigned' if unsigned else 'signed'} DyBit has {least} to 8 bits; got {bits}."
        )
    magnitudes = [dybit_magnitude(code, n) for code in range(2**n)]
    table = magnitudes if unsigned else magnitudes + [0.0 - v for v in magnitudes]  # both codes of zero are +0
    return TableFormat(match[0], bits, table=tuple(table))


PART = Family(
    pattern=r"(u)?dybit(\d+)",
    build=_build,
    listed=(*(f"dybit{b}" for b in range(2, 9)), *(f"udybit{b}" for b in range(2, 9))),
)
