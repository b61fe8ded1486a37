"""Golden values: number-formats sheet, section 8 (AF4, block 64)."""

from __future__ import annotations

import numpy as np

from nybble.formats import get_format

TABLE = [
    *(-1, -0.69441008, -0.51243739, -0.3736951, -0.25607552, -0.14982478, -0.04934812, 0),
    *(0.04273164, 0.12934483, 0.21961274, 0.31675666, 0.42563882, 0.55496234, 0.72424863, 1),
]


def test_table() -> None:
    fmt = get_format("af4")
    assert (
        np.array_equal(fmt.values.astype(np.float32), np.array(TABLE, np.float32))
        and fmt.bits == 4
        and len(fmt.grid) == 16
    )
