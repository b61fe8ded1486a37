"""Golden values: number-formats sheet, section 7."""

from __future__ import annotations

import pytest

from nybble.core.errors import FormatError
from nybble.formats import get_format


@pytest.mark.parametrize("bits", range(2, 9))
def test_ranges(bits: int) -> None:
    half = 2 ** (bits - 1)
    symmetric, full, unsigned = (get_format(f"{n}") for n in (f"int{bits}", f"int{bits}_full", f"uint{bits}"))
    assert (symmetric.min, symmetric.max, len(symmetric.grid)) == (1 - half, half - 1, 2 * half - 1)
    assert (full.min, full.max, len(full.grid)) == (-half, half - 1, 2 * half)
    assert (unsigned.min, unsigned.max, len(unsigned.grid)) == (0, 2 * half - 1, 2 * half)


def test_codes_are_twos_complement() -> None:
    assert get_format("int4").values.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1]
    assert get_format("uint2").values.tolist() == [0, 1, 2, 3]
    assert not get_format("int4").encodable()[8] and get_format("int4_full").encodable()[8]


def test_named_maxima() -> None:
    """INT8 127, INT4 7, INT3 3, INT2 1."""
    assert [get_format(f"int{b}").max for b in (8, 4, 3, 2)] == [127, 7, 3, 1]


@pytest.mark.parametrize(
    ("name", "words"),
    [("int9", "1 to 8 bits"), ("int1", "'binary'"), ("uint4_full", "write uint4"), ("int0", "1 to 8")],
)
def test_impossible(name: str, words: str) -> None:
    with pytest.raises(FormatError, match=words):
        get_format(name)
