"""Golden values: DyBit sheet, tables and faithful checks 1 to 3 and 5."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from nybble.core.errors import FormatError
from nybble.formats import get_format
from nybble.formats.dybit import dybit_magnitude
from nybble.ops.rounding import decode, encode


def test_four_bits_unsigned() -> None:
    assert get_format("udybit4").values.tolist() == [
        *(0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875),
        *(1, 1.25, 1.5, 1.75, 2, 3, 4, 8),
    ]


@pytest.mark.parametrize(
    ("bits", "magnitudes"), [(4, [0, 0.25, 0.5, 0.75, 1, 1.5, 2, 4]), (3, [0, 0.5, 1, 2]), (2, [0, 1])]
)
def test_signed(bits: int, magnitudes: list[float]) -> None:
    assert get_format(f"dybit{bits}").values.tolist() == magnitudes + [-v for v in magnitudes]


def test_two_bits_unsigned() -> None:
    assert get_format("udybit2").values.tolist() == [0, 0.5, 1, 2]


def test_eight_bits_by_region() -> None:
    """First value, last value, step and count for each number of leading ones."""
    grid = get_format("dybit8").grid
    positive = grid[grid >= 0]
    regions = [
        (0, 63 / 64, 1 / 64, 64),
        (1, 1.96875, 1 / 32, 32),
        (2, 3.875, 1 / 8, 16),
        (4, 7.5, 1 / 2, 8),
        (8, 14, 2, 4),
        (16, 24, 8, 2),
    ]
    want = np.concatenate(
        [np.arange(first, last + step / 2, step) for first, last, step, _ in regions] + [np.array([32, 64])]
    )
    assert np.array_equal(positive, want) and [r[3] for r in regions] == [64, 32, 16, 8, 4, 2]
    assert get_format("udybit8").smallest == 1 / 128 and get_format("udybit8").max == 128
    five = [i / 16 for i in range(16)] + [1 + i / 8 for i in range(8)] + [2, 2.5, 3, 3.5, 4, 6, 8, 16]
    assert get_format("udybit5").values.tolist() == five


@pytest.mark.parametrize("n", range(1, 9))
def test_rule_and_order(n: int) -> None:
    """Strictly increasing in the code; 2^n values; range 2^(2n - 2); a leading-one reference in text."""
    values = [dybit_magnitude(code, n) for code in range(2**n)]
    assert all(b > a for a, b in itertools.pairwise(values)) and values[-1] == 2 ** (n - 1)
    if n > 1:
        assert values[-1] / values[1] == 2 ** (2 * n - 2)
    for code, value in enumerate(values):
        bits = f"{code:0{n}b}"
        ones = len(bits) - len(bits.lstrip("1"))
        rest = bits[ones + 1 :]
        if ones == n:
            want = 2.0 ** (n - 1)
        elif ones == 0:
            want = int(rest or "0", 2) / 2 ** (n - 1)
        else:
            want = 2.0 ** (ones - 1) * (1 + int(rest or "0", 2) / 2 ** len(rest))
        assert value == want


@pytest.mark.parametrize("bits", range(2, 9))
def test_counts_and_the_canonical_zero(bits: int) -> None:
    signed, unsigned = get_format(f"dybit{bits}"), get_format(f"udybit{bits}")
    assert len(signed.grid) == 2**bits - 1 and len(unsigned.grid) == 2**bits
    both = torch.tensor([0, 2 ** (bits - 1)], dtype=torch.uint8)
    assert decode(both, signed.name).tolist() == [0, 0]
    assert not decode(both, signed.name).signbit().any()
    assert encode(torch.tensor([0.0, -0.0, -1e-9]), signed.name, "nearest-even").tolist() == [0, 0, 0]


def test_products_are_integers_and_shifts() -> None:
    """Check 5: every value is an integer over 2^(n - 1), so products of decoded values are exact."""
    values = get_format("dybit8").values * 2**6
    assert np.array_equal(values, values.round())
    x = torch.from_numpy(get_format("dybit8").values.astype(np.float32))
    exact = torch.from_numpy(np.outer(values.astype(np.int64), values.astype(np.int64))).double() / 2**12
    assert torch.equal((x[:, None] * x[None]).double(), exact)


@pytest.mark.parametrize("name", ["dybit1", "udybit0", "dybit9"])
def test_impossible(name: str) -> None:
    with pytest.raises(FormatError, match="DyBit"):
        get_format(name)
