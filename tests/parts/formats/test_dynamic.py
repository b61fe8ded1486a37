"""Golden values: number-formats sheet, sections 0 and 9; 4-bit optimizer sheet, maps."""

from __future__ import annotations

import numpy as np
import pytest

from nybble.core.errors import FormatError
from nybble.formats import get_format

SIGNED4 = [
    *(-0.8875, -0.6625, -0.4375, -0.2125, -0.0775, -0.0325, -0.0055, 0),
    *(0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875, 1.0),
]
UNSIGNED4 = [
    *(0, 0.00325, 0.00775, 0.02125, 0.04375, 0.06625, 0.08875, 0.15625),
    *(0.26875, 0.38125, 0.49375, 0.60625, 0.71875, 0.83125, 0.94375, 1.0),
]


def close(name: str, table: list[float]) -> bool:
    """To float32: the map is built of float32 steps, the sheet's numbers are exact."""
    return bool(np.allclose(get_format(name).values, table, rtol=3e-7, atol=0))


def test_four_and_three_bits() -> None:
    assert close("dynamic4", SIGNED4)
    assert close("udynamic4", UNSIGNED4)
    assert close("udynamic4_de0", [UNSIGNED4[1], *UNSIGNED4[1:]])
    assert close("dynamic3", [-0.775, -0.325, -0.055, 0, 0.055, 0.325, 0.775, 1])


@pytest.mark.parametrize(
    ("name", "smallest", "below_one", "cells"),
    [
        ("dynamic8", 5.5e-7, 0.99296875, (1, 2, 4, 8, 16, 32, 64)),
        ("udynamic8", 3.25e-7, 0.99648, (2, 4, 8, 16, 32, 64, 128)),
    ],
)
def test_eight_bits(name: str, smallest: float, below_one: float, cells: tuple[int, ...]) -> None:
    fmt = get_format(name)
    assert len(fmt.grid) == 256 and fmt.max == 1 and 0 in fmt.grid and fmt.min > -1
    assert fmt.smallest == pytest.approx(smallest, rel=1e-6) and fmt.grid[-2] == pytest.approx(below_one, rel=1e-5)
    positive = fmt.grid[(fmt.grid > 0) & (fmt.grid < 1)]
    decades = np.floor(np.log10(positive)).astype(int)
    assert [int((decades == d).sum()) for d in range(-7, 0)] == list(cells)
    if fmt.signed:
        assert np.array_equal(positive, -fmt.grid[fmt.grid < 0][::-1])


def test_without_zero() -> None:
    """DE-0 wastes one code: two of them hold the smallest value, and the encoder uses the first."""
    fmt = get_format("udynamic4_de0")
    assert len(fmt.grid) == 15 and fmt.min > 0 and fmt.grid_codes[0] == 0 and 1 not in fmt.produced


@pytest.mark.parametrize("name", ["dynamic9", "dynamic1", "dynamic4_de0"])
def test_impossible(name: str) -> None:
    with pytest.raises(FormatError, match=name):
        get_format(name)
