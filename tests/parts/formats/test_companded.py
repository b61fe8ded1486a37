"""Golden values: y / (2 - |y|) and y**2 of equally spaced y; every float32 of a block to the nearest value."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from nybble.core.errors import FormatError
from nybble.formats import get_format
from nybble.ops.rounding import round_to
from nybble.quantizer import Quantizer


def test_tables() -> None:
    signed = [Fraction(k, 127) / (2 - abs(Fraction(k, 127))) for k in range(-127, 128)]
    assert np.array_equal(get_format("companded8").grid, np.array([float(v) for v in signed], np.float32))
    assert get_format("companded8").values[[0, 127, 254, 255]].tolist() == [-1, 0, 1, 1]
    squares = [float(Fraction(k, 256) ** 2) for k in range(1, 257)]
    assert get_format("ucompanded8").values.tolist() == squares and not get_format("ucompanded8").has_zero
    assert len(get_format("companded4").grid) == 15 and len(get_format("ucompanded4").grid) == 16


def test_steps_are_equal_where_they_are_compressed() -> None:
    for name, compress in (("companded8", lambda x: 2 * x / (1 + abs(x))), ("ucompanded8", np.sqrt)):
        gaps = np.diff(compress(get_format(name).grid.astype(np.float64)))
        assert np.allclose(gaps, gaps[0], rtol=1e-4)


@pytest.mark.parametrize("name", ["companded8", "ucompanded8"])
def test_all_mantissas(name: str) -> None:
    """Each of the 2**23 mantissas in two octaves of [0, 1]: the nearest value, so the error is half a gap at most."""
    grid = torch.from_numpy(get_format(name).grid.astype(np.float32)).double()
    mantissas = torch.arange(1 << 23, dtype=torch.int32)
    for exponent in (-1, -6):
        x = ((exponent + 127) << 23 | mantissas).view(torch.float32)
        y = round_to(x, name, "nearest-even").double()
        above = torch.searchsorted(grid, x.double()).clamp(1, len(grid) - 1)
        nearest = torch.minimum((grid[above] - x).abs(), (x - grid[above - 1]).abs())
        assert torch.equal((y - x).abs(), nearest)


def test_what_it_is_for() -> None:
    """Less error than equal steps: of a momentum twice in the root of the mean square, of sqrt(v) far more at worst."""
    draw = torch.Generator().manual_seed(0)
    m = torch.randn(256, 256, generator=draw) * torch.rand(256, 256, generator=draw) ** 2
    v = torch.randn(256, 256, generator=draw).square() + 1e-4

    def error(x: torch.Tensor, line: str) -> torch.Tensor:
        return Quantizer(line).quantize(x).dequantize() - x

    rms = [error(m, line).square().mean().sqrt() for line in ("companded8 flat=256", "int8 flat=256")]
    assert rms[0] < 0.75 * rms[1]
    worst = []
    for line in ("ucompanded8 flat=256", "linear8 flat=256"):
        found = Quantizer(line).quantize(v).dequantize()
        worst.append((found.sqrt() / v.sqrt() - 1).abs().max())
    assert worst[0] < 0.5 * worst[1]


@pytest.mark.parametrize("name", ["companded9", "ucompanded1"])
def test_impossible(name: str) -> None:
    with pytest.raises(FormatError, match=f"{name}: companded maps have 2 to 8 bits"):
        get_format(name)
