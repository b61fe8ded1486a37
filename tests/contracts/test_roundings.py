"""What every rounding must do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nybble.core.errors import FormatError
from nybble.formats import format_names, get_format
from nybble.ops.rounding import round_integers, round_stochastic, round_to, round_to_codes
from nybble.rounding import REGISTRY, get_rounding

ROUNDINGS = REGISTRY.names()
DETERMINISTIC = [name for name in ROUNDINGS if get_rounding(name).tie_up is not None]

# -2.5, -1.5, -0.5, 0.5, 1.5, 2.5 to integers, by the definition in the name
GOLDEN = {
    "nearest-even": [-2, -2, 0, 0, 2, 2],
    "nearest-even-float32": [-2, -2, 0, 0, 2, 2],
    "nearest-even-code": [-2, -2, 0, 0, 2, 2],
    "half-away": [-3, -2, -1, 1, 2, 3],
    "toward-zero": [-2, -1, 0, 0, 1, 2],
    "half-up": [-2, -1, 0, 1, 2, 3],
    "half-down": [-3, -2, -1, 0, 1, 2],
    "half-down-float32": [-3, -2, -1, 0, 1, 2],
}


@pytest.mark.parametrize("name", ROUNDINGS)
def test_named_as_registered(name: str) -> None:
    part = get_rounding(name)
    assert part.name == name
    assert (part.tie_up is not None) + part.native + part.stochastic == 1, "a rounding is one of the three"


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_ties(name: str) -> None:
    assert name in GOLDEN, f"say in GOLDEN what {name} makes of ties"
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert round_to(x, "int8", name).tolist() == GOLDEN[name]
    assert round_integers(x, name).tolist() == GOLDEN[name]


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_integers_without_bounds(name: str) -> None:
    """Around a zero point codes are not bounded yet; everywhere int8 reaches, both ways agree."""
    x = torch.cat([torch.linspace(-127.4, 127.4, 4096), torch.arange(-127, 127) + 0.5])
    assert torch.equal(round_integers(x, name), round_to(x, "int8", name))
    far = torch.tensor([1e9, -1e9, 16777217.0, 3e38, -3e38])
    assert torch.equal(round_integers(far, name), far)
    assert round_integers(torch.tensor([torch.nan, torch.inf, -torch.inf]), name).tolist()[1:] == [
        torch.inf,
        -torch.inf,
    ]
    ahead = torch.nextafter(torch.tensor([0.5, 1.5, 4194303.5]), torch.tensor(0.0))
    assert round_integers(ahead, name).tolist() == [0, 1, 4194303]


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_with_a_zero_point(name: str) -> None:
    y, zero = torch.tensor([-0.5, 0.5, 1.5, 2.5, 3.25]), torch.tensor(3.0)
    codes = round_to_codes(y, zero, -8, 7, name)
    if get_rounding(name).zero_inside:
        assert codes.tolist() == [2, 4, 4, 6, 6]  # 2.5, 3.5, 4.5, 5.5, 6.25 to even
    else:
        assert torch.equal(codes, round_integers(y, name) + 3)


@pytest.mark.parametrize("name", sorted(set(ROUNDINGS) - set(DETERMINISTIC)))
def test_the_others_round_no_integers(name: str) -> None:
    with pytest.raises(FormatError, match=name):
        round_integers(torch.zeros(1), name)


@pytest.mark.parametrize("name", format_names())
@pytest.mark.parametrize("rounding", DETERMINISTIC)
def test_monotone(name: str, rounding: str) -> None:
    assert (np.diff(get_format(name).thresholds(rounding)) >= 0).all()


def test_float32_midpoints() -> None:
    """The midpoint of these NF4 neighbours has 25 bits and rounds up: the float32 at it is past the exact midpoint."""
    fmt = get_format("nf4")
    exact = (fmt.grid[:-1] + fmt.grid[1:]) / 2
    rounded = exact.astype(np.float32)
    moved = np.flatnonzero(rounded.astype(np.float64) > exact)
    assert len(moved)
    x = torch.from_numpy(rounded[moved])
    upper = torch.from_numpy(fmt.grid[moved + 1].astype(np.float32))
    lower = torch.from_numpy(fmt.grid[moved].astype(np.float32))
    assert torch.equal(round_to(x, "nf4", "half-down"), upper)
    assert torch.equal(round_to(x, "nf4", "half-down-float32"), lower)


@pytest.mark.parametrize("name", format_names())
def test_stochastic_stays_between_the_neighbours(name: str) -> None:
    fmt = get_format(name)
    generator = torch.Generator().manual_seed(1)
    grid = torch.from_numpy(fmt.grid.astype(np.float32))
    for _ in range(4):
        assert torch.equal(round_stochastic(grid, name, generator), grid), "a value of the grid moved"
    x = grid[:-1] / 2 + grid[1:] / 2
    rounded = round_stochastic(x, name, generator)
    assert ((rounded == grid[:-1]) | (rounded == grid[1:])).all()
    out = round_stochastic(torch.tensor([torch.inf, -torch.inf, torch.nan]), name, generator)
    assert out[:2].tolist() == [fmt.max, fmt.min] and out[2].isnan()


def test_stochastic_follows_its_generator() -> None:
    x = torch.randn(1000)
    before = torch.get_rng_state()
    first = round_stochastic(x, "int8", torch.Generator().manual_seed(3))
    assert torch.equal(first, round_stochastic(x, "int8", torch.Generator().manual_seed(3)))
    assert not torch.equal(first, round_stochastic(x, "int8", torch.Generator().manual_seed(4)))
    assert torch.equal(before, torch.get_rng_state())
