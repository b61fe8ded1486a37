"""Golden values: number-formats sheet, sections 0 and 3."""

from __future__ import annotations

import numpy as np

from nybble.formats import get_format


def test_codes() -> None:
    fmt = get_format("e8m0")
    assert (
        fmt.values[127] == 1
        and fmt.values[0] == 2.0**-127
        and fmt.values[254] == 2.0**127
        and np.isnan(fmt.values[255])
    )
    assert len(fmt.grid) == 255 and fmt.min > 0 and not fmt.signed and fmt.nan_code == 255


def test_the_smallest_is_a_float32_subnormal() -> None:
    assert np.float32(get_format("e8m0").min).view(np.uint32) == 0x00400000
