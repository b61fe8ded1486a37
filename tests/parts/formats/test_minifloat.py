"""Golden values: number-formats sheet, sections 0 (table), 1, 2 and 6; minifloats-on-FPGAs sheet (all-finite table)."""

from __future__ import annotations

import numpy as np
import pytest

from nybble.core.errors import FormatError
from nybble.formats import get_format
from nybble.formats.minifloat import Minifloat

E3M2 = [
    *(0, 0.0625, 0.125, 0.1875, 0.25, 0.3125, 0.375, 0.4375, 0.5, 0.625, 0.75, 0.875, 1, 1.25, 1.5, 1.75),
    *(2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28),
]


@pytest.mark.parametrize(
    ("name", "distinct", "largest", "min_normal", "smallest"),
    [  # section 0
        ("float8_e4m3fn", 253, 448, 2.0**-6, 2.0**-9),
        ("float8_e5m2", 247, 57344, 2.0**-14, 2.0**-16),
        ("float8_e4m3fnuz", 255, 240, 2.0**-7, 2.0**-10),
        ("float8_e5m2fnuz", 255, 57344, 2.0**-15, 2.0**-17),
        ("float6_e3m2fn", 63, 28, 0.25, 0.0625),
        ("float6_e2m3fn", 63, 7.5, 1, 0.125),
        ("float4_e2m1fn", 15, 6, 1, 0.5),
    ],
)
def test_summary_table(name: str, distinct: int, largest: float, min_normal: float, smallest: float) -> None:
    fmt = get_format(name)
    assert (len(fmt.grid), fmt.max, fmt.min_normal, fmt.smallest) == (distinct, largest, min_normal, smallest)
    assert fmt.min == -largest


@pytest.mark.parametrize(
    ("name", "code", "value"),
    [  # section 1
        ("float8_e4m3fn", 0x7E, 448.0),
        ("float8_e4m3fn", 0x08, 2.0**-6),
        ("float8_e4m3fn", 0x07, 0.013671875),
        ("float8_e4m3fn", 0x01, 2.0**-9),
        ("float8_e4m3fn", 0xFE, -448.0),
        ("float8_e5m2", 0x7B, 57344.0),
        ("float8_e5m2", 0x7C, np.inf),
        ("float8_e5m2", 0xFC, -np.inf),
        ("float8_e5m2", 0x04, 2.0**-14),
        ("float8_e5m2", 0x01, 2.0**-16),
    ],
)
def test_spot_codes(name: str, code: int, value: float) -> None:
    assert get_format(name).values[code] == value


@pytest.mark.parametrize(
    ("name", "nan", "inf"),
    [
        ("float8_e4m3fn", [0x7F, 0xFF], []),
        ("float8_e5m2", [0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF], [0x7C, 0xFC]),
        ("float8_e4m3fnuz", [0x80], []),
        ("float8_e5m2fnuz", [0x80], []),
        ("float8_e4m3", [*range(0x79, 0x80), *range(0xF9, 0x100)], [0x78, 0xF8]),
        ("float4_e2m1fn", [], []),
        ("float6_e3m2fn", [], []),
        ("float6_e2m3fn", [], []),
    ],
)
def test_special_codes(name: str, nan: list[int], inf: list[int]) -> None:
    values = get_format(name).values
    assert np.flatnonzero(np.isnan(values)).tolist() == nan and np.flatnonzero(np.isinf(values)).tolist() == inf


def test_other_styles() -> None:
    """Section 1, last line: IEEE-style E4M3, E3M4, and a bias of 11."""
    assert get_format("float8_e4m3").max == 240
    assert get_format("float8_e3m4").max == 15.5
    assert get_format("float8_e4m3b11fnuz").max == 30


def test_fp6_and_fp4_tables() -> None:
    """Section 2."""
    assert get_format("e3m2").values[:32].tolist() == E3M2
    assert np.array_equal(get_format("e3m2").values[32:], -np.array(E3M2))
    e2m3 = [i * 0.125 for i in range(16)] + [2 + i * 0.25 for i in range(8)] + [4 + i * 0.5 for i in range(8)]
    assert get_format("e2m3").values[:32].tolist() == e2m3
    assert get_format("e2m1").values[:8].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert get_format("e2m1").values[8:].tolist() == [0, -0.5, -1, -1.5, -2, -3, -4, -6]


def test_fp4_ties() -> None:
    """Section 2: 0.25->0, 0.75->1, 1.25->1, 1.75->2, 2.5->2, 3.5->4, 5->4; the first that rounds up."""
    up = np.nextafter(np.array([0.25, 1.25, 2.5, 5], np.float32), np.float32(np.inf))
    assert get_format("e2m1").thresholds()[7:].tolist() == [up[0], 0.75, up[1], 1.75, up[2], 3.5, up[3]]


@pytest.mark.parametrize(
    ("name", "bias", "largest", "min_normal", "smallest", "distinct"),
    [  # minifloats on FPGAs, table of formats
        ("e1m1", 0, 3, 2, 1, 7),
        ("e2m0", 1, 4, 1, 1, 7),
        ("e1m2", 0, 3.5, 2, 0.5, 15),
        ("e3m0", 3, 16, 0.25, 0.25, 15),
        ("e2m2", 1, 7, 1, 0.25, 31),
        ("e3m1", 3, 24, 0.25, 0.125, 31),
        ("e4m0", 7, 256, 2.0**-6, 2.0**-6, 31),
        ("e4m1", 7, 384, 2.0**-6, 2.0**-7, 63),
        ("e2m4", 1, 7.75, 1, 0.0625, 127),
        ("e3m3", 3, 30, 0.25, 0.03125, 127),
        ("e4m2", 7, 448, 2.0**-6, 2.0**-8, 127),
        ("e2m5", 1, 7.875, 1, 2.0**-5, 255),
        ("e3m4", 3, 31, 0.25, 2.0**-6, 255),
        ("float8_e4m3_finite", 7, 480, 2.0**-6, 2.0**-9, 255),
        ("float8_e5m2_finite", 15, 114688, 2.0**-14, 2.0**-16, 255),
    ],
)
def test_all_finite(name: str, bias: int, largest: float, min_normal: float, smallest: float, distinct: int) -> None:
    fmt = get_format(name)
    assert isinstance(fmt, Minifloat)
    assert (fmt.bias, fmt.max, fmt.min_normal, fmt.smallest, len(fmt.grid)) == (
        *(bias, largest, min_normal, smallest, distinct),
    )
    # section 6, the formulas
    e, m = fmt.e, fmt.m
    assert fmt.max == 2.0 ** (2**e - 1 - bias) * (2 - 2.0**-m) and len(fmt.grid) == 2 ** (1 + e + m) - 1


def test_no_mantissa_is_powers_of_two() -> None:
    """Section 6: ExM0 = {0} and powers of two."""
    assert get_format("e3m0").grid.tolist()[7:] == [0, 0.25, 0.5, 1, 2, 4, 8, 16]


def test_unsigned() -> None:
    fmt = get_format("ufloat4_e2m2_finite")
    assert fmt.min == 0 and len(fmt.grid) == 16 and fmt.max == 7 and fmt.negative_zero is None


@pytest.mark.parametrize(
    ("short", "name"),
    [
        *(("e2m1", "float4_e2m1fn"), ("e4m3", "float8_e4m3fn"), ("e5m2", "float8_e5m2"), ("e3m2", "float6_e3m2fn")),
        *(
            ("e2m3", "float6_e2m3fn"),
            ("e1m2", "float4_e1m2_finite"),
            ("e8m7", "float16_e8m7"),
            ("ue4m4", "ufloat8_e4m4_finite"),
        ),
        ("float4_e2m1_finite", "float4_e2m1fn"),
    ],
)
def test_short_names(short: str, name: str) -> None:
    assert get_format(short).name == name


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("float8_e2m1fn", "1 sign + 2 + 1 bits make 4, not 8"),
        ("e0m3", "at least one exponent bit"),
        ("e9m9", "minifloats have 2 to 16"),
        ("float4_e1m2", "none to spare"),
        ("e5m2b200", "leaves the range of float32"),
    ],
)
def test_impossible(name: str, words: str) -> None:
    with pytest.raises(FormatError, match=words.replace("+", "[+]")):
        get_format(name)
