"""``nfK``: K-bit NormalFloat, quantiles of the normal distribution with an exact zero and both ends exactly +-1.

Dettmers et al. 2023, arXiv:2305.14314, in the form that bitsandbytes ships for four bits: 2**(K - 1) positive values at
probabilities evenly spaced from p0 down to 1/2, one negative value fewer, a zero, all over the largest;
p0 = ((1 - 1 / (2 n - 2)) + (1 - 1 / (2 n))) / 2 with n = 2**K. NF4's own encoder compares with constants of its own
(``rounding=native``: a tie keeps the lower code); the others publish none.
"""

from __future__ import annotations

import re
from statistics import NormalDist

import numpy as np

from nybble.core.errors import FormatError
from nybble.formats._base import Family, TableFormat, float32_steps

_NF4_UPPER_NEEDS_MORE_THAN = (
    *(-0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984),
    *(-0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668),
    *(0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011),
)
_NF4_NATIVE = np.nextafter(np.array(_NF4_UPPER_NEEDS_MORE_THAN, np.float32), np.float32(np.inf))


def normal_values(bits: int) -> np.ndarray:
    """float32 [2**bits], ascending; float32 at every step, so that four bits give the table of others' files."""
    codes = 2**bits
    largest = round(((1 - 1 / (2 * codes - 2)) + (1 - 1 / (2 * codes))) / 2, 7)  # bitsandbytes writes 0.9677083
    positive, negative = (_quantiles(largest, count) for count in (codes // 2, codes // 2 - 1))
    values: np.ndarray = np.concatenate([-negative, np.zeros(1, np.float32), positive[::-1]]) / positive.max()
    return values


def _quantiles(largest: float, count: int) -> np.ndarray:
    """float32 [count], descending: where the normal distribution reaches ``largest`` .. 1/2, without the last."""
    probabilities = float32_steps(largest, 0.5, count)[:-1]
    return np.array([NormalDist().inv_cdf(float(p)) for p in probabilities], np.float32)


def _build(match: re.Match[str]) -> TableFormat:
    bits = int(match[1])
    if not 2 <= bits <= 8:
        raise FormatError(f"{match[0]}: normal floats have 2 to 8 bits; got {bits}.")
    native = tuple(float(t) for t in _NF4_NATIVE) if bits == 4 else None
    return TableFormat(match[0], bits, table=tuple(float(v) for v in normal_values(bits)), native_thresholds=native)


PART = Family(pattern=r"nf(\d+)", build=_build, listed=tuple(f"nf{bits}" for bits in range(2, 9)))
