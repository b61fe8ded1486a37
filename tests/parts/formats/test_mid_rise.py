"""Mid-rise grids: StatsQ's levels and thresholds, ofq sheet; ties as ``round(2 w / s - 0.5)`` has them."""

from __future__ import annotations

import pytest
import torch

from nybble.core.errors import FormatError
from nybble.formats import get_format
from nybble.quantizer import Quantizer


def test_golden_values() -> None:
    assert get_format("midrise2").values.tolist() == [-1.5, -0.5, 0.5, 1.5]
    assert get_format("midrise3").grid.tolist() == [-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5]
    assert not get_format("midrise4").has_zero and get_format("midrise8").max == 127.5


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rounding_formula(bits: int) -> None:
    """s (round(clip(w / s) n - 0.5) + 0.5) / n with n = 2**(bits - 1) and s = 2 mean|w|, ties and zeros too."""
    n = 2 ** (bits - 1)
    x = torch.cat([torch.arange(-4 * n, 4 * n + 1) / 4.0, torch.tensor([-0.0])])  # in units of the step
    expected = ((x / n).clamp(-1 + 1e-2 / n, 1 - 1e-2 / n) * n - 0.5).round() + 0.5
    found = Quantizer(f"midrise{bits} scale=fixed(value=1)").fake_quantize(x)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["midrise1", "midrise9", "midrise0"])
def test_impossible(name: str) -> None:
    with pytest.raises(FormatError, match="2 to 8 bits"):
        get_format(name)
