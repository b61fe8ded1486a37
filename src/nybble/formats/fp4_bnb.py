"""bitsandbytes' FP4: magnitudes 0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3, 1 in a permuted code order; bit 3 is the sign.

Not OCP E2M1 over 6: the smallest value is 16 times smaller and the codes are permuted, so never exchange codes. Its
encoder compares magnitudes with constants of its own (``rounding=native``: a tie keeps the smaller magnitude).
"""

from __future__ import annotations

import numpy as np

from nybble.formats._base import TableFormat

_MAGNITUDES = (0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12)
_TIES = np.array((0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333), np.float32)
_NATIVE = np.concatenate([-_TIES[::-1], np.nextafter(_TIES, np.float32(np.inf))])

PART = TableFormat(
    "fp4_bnb",
    4,
    aliases=("fp4-bnb", "bnb_fp4"),
    table=(*_MAGNITUDES, *(-v for v in _MAGNITUDES)),
    native_thresholds=tuple(float(t) for t in _NATIVE),
)
