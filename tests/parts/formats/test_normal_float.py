"""Golden values: QLoRA sheet, NF4 table and the constants of the GPU encoder; number-formats sheet, section 0."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nybble.core.errors import FormatError
from nybble.formats import get_format

TABLE = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
CONSTANTS = np.array(
    [
        *(-0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984),
        *(-0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668),
        *(0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011),
    ],
    np.float32,
)


def test_table() -> None:
    fmt = get_format("nf4")
    assert fmt.values.tolist() == TABLE and fmt.bits == 4
    assert f"{fmt.smallest:.4f}" == "0.0796" and len(fmt.grid) == 16


def test_a_tie_keeps_the_lower_code() -> None:
    own = get_format("nf4").thresholds("native")
    assert np.array_equal(np.nextafter(own, np.float32(-9)), CONSTANTS)
    middles = (np.array(TABLE[:-1], np.float32) + np.array(TABLE[1:], np.float32)) / 2
    assert np.abs(CONSTANTS - middles).max() < 3e-8


@pytest.mark.parametrize("bits", range(2, 9))
def test_construction(bits: int) -> None:
    """Quantiles by torch's inverse at torch's spacing: 2^(k - 1) above zero, one fewer below, over the largest."""
    codes = 2**bits
    largest = round(1 - (1 / (codes - 1) + 1 / codes) / 4, 7)
    above, below = (
        torch.special.ndtri(torch.linspace(largest, 0.5, count + 1)[:-1].double()).float()
        for count in (codes // 2, codes // 2 - 1)
    )
    want = torch.cat([-below, torch.zeros(1), above.flip(0)]) / above.max()
    fmt = get_format(f"nf{bits}")
    assert fmt.values.tolist() == want.tolist()
    assert (fmt.min, fmt.max, len(fmt.grid), int((fmt.grid > 0).sum())) == (-1, 1, codes, codes // 2)


def test_two_and_three_bits() -> None:
    """To the digits of a table of the normal distribution: z(0.8541667) = 1.05447, z(0.6770834) = 0.45956; ..."""
    assert np.allclose(get_format("nf2").values, [-1, 0, 0.45956 / 1.05447, 1], atol=1e-5)
    assert np.allclose(
        get_format("nf3").values, [-1, -0.53502, -0.24693, 0, 0.18334, 0.38199, 0.62299, 1], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("name", ["nf1", "nf9", "nf16"])
def test_impossible(name: str) -> None:
    with pytest.raises(FormatError, match="2 to 8 bits"):
        get_format(name)
