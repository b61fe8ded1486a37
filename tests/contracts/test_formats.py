"""What every number format must do; a new file in nybble/formats is picked up by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.contracts.inputs import all_float16, near_decisions, random_bits, same

from nybble.core.errors import FormatError
from nybble.formats import REGISTRY, Family, NumberFormat, format_names, get_format
from nybble.ops.rounding import decode, encode, round_to
from nybble.rounding import REGISTRY as ROUNDINGS
from nybble.rounding import Rounding

FORMATS = format_names()
TIE_RULES = [name for name, part in ROUNDINGS.all().items() if part.tie_up is not None and not part.float32_middle]


def brute_force(x: np.ndarray, fmt: NumberFormat, rounding: Rounding) -> np.ndarray:
    """Indices into the grid by the distance to every value, in exact float64 arithmetic on float32 inputs.

    Independent of ``fmt.thresholds``: a tie is an input with two nearest values.
    """
    grid = fmt.grid
    inside = np.clip(x.astype(np.float64), grid[0], grid[-1])
    upper = np.clip(np.searchsorted(grid, inside, side="left"), 1, len(grid) - 1)
    lower = upper - 1
    # as differences, grid[upper] - inside too, what is tiny beside a step would be lost where 0 lies between values
    twice, both = 2 * inside, grid[lower] + grid[upper]
    even = fmt.grid_codes % 2 == 0
    # Neighbouring codes of one parity: there is no even one, so the smaller magnitude stands in for it.
    alike = even[lower] == even[upper]
    up_is_even = np.where(alike, np.abs(grid[upper]) < np.abs(grid[lower]), even[upper])
    assert rounding.tie_up is not None
    tie_up = np.broadcast_to(np.asarray(rounding.tie_up(grid[lower], grid[upper], up_is_even)), x.shape)
    return np.where((twice > both) | ((twice == both) & tie_up), upper, lower)


def test_every_part_is_listed() -> None:
    for key, part in REGISTRY.all().items():
        names = part.listed if isinstance(part, Family) else (part.name,)
        assert set(names) <= set(FORMATS), key
        assert len(set(names)) == len(names), f"{key} lists a format twice"
    assert len(set(FORMATS)) == len(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_names_lead_back(name: str) -> None:
    fmt = get_format(name)
    assert fmt.name == name
    for alias in fmt.aliases:
        assert get_format(alias) == fmt
    assert hash(fmt) == hash(get_format(name))


@pytest.mark.parametrize("name", FORMATS)
def test_table_facts(name: str) -> None:
    fmt = get_format(name)
    values, codes = fmt.values, fmt.grid_codes
    assert values.shape == (2**fmt.bits,)
    assert (values.astype(np.float32).astype(np.float64) == values)[np.isfinite(values)].all(), "not exact in float32"
    assert (np.diff(fmt.grid) > 0).all()
    assert np.array_equal(values[codes] + 0.0, fmt.grid)
    assert fmt.encodable()[codes].all()
    assert set(fmt.grid) == {v + 0.0 for v in values[fmt.encodable()]}, "a value that no code reaches"
    assert fmt.max == fmt.grid[-1] and fmt.min == fmt.grid[0] and fmt.absmax == max(abs(fmt.min), abs(fmt.max))
    assert fmt.signed == (fmt.grid < 0).any()
    assert fmt.smallest == np.abs(fmt.grid[fmt.grid != 0]).min() <= fmt.min_normal <= fmt.absmax
    if fmt.is_integer:
        assert (np.diff(fmt.grid) == 1).all()
    if fmt.negative_zero is not None:
        assert values[fmt.negative_zero] == 0 and np.signbit(values[fmt.negative_zero])
    if fmt.nan_code is not None:
        assert np.isnan(values[fmt.nan_code])


@pytest.mark.parametrize("name", FORMATS)
def test_every_code_round_trips(name: str) -> None:
    fmt = get_format(name)
    codes = torch.arange(2**fmt.bits, dtype=torch.uint8 if fmt.bits <= 8 else torch.int32)
    values = decode(codes, name)
    assert np.array_equal(values.numpy(), fmt.values.astype(np.float32), equal_nan=True)
    finite = torch.from_numpy(fmt.encodable())
    again = encode(values[finite], name, "nearest-even")
    assert same(decode(again, name), values[finite])
    assert fmt.produced == set(again.tolist()), "codes that appear from nowhere, or never"
    assert same(round_to(values[finite], name, "nearest-even"), values[finite])


# The one decision of `binary` is the sign, whatever the tie rule: parts/formats/test_binary.py
@pytest.mark.parametrize("rounding", TIE_RULES)
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "binary"])
def test_nearest_by_brute_force(name: str, rounding: str) -> None:
    """All float16 inputs, every value, every midpoint and their neighbours."""
    fmt = get_format(name)
    x = torch.cat([near_decisions(fmt), all_float16(), random_bits(4096)])
    x = x[~x.isnan()]
    want = brute_force(x.numpy(), fmt, ROUNDINGS.get(rounding))
    value = torch.from_numpy(fmt.grid.astype(np.float32)[want])
    if fmt.negative_zero is not None:
        value = torch.where((value == 0) & x.signbit(), -0.0, value)
    assert same(round_to(x, name, rounding), value)
    code = torch.from_numpy(fmt.grid_codes.astype(np.int32)[want])
    if fmt.negative_zero is not None:
        code = torch.where((value == 0) & x.signbit(), fmt.negative_zero, code)
    assert torch.equal(encode(x, name, rounding).int(), code.int())


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_extremes_infinities_and_nan(name: str) -> None:
    fmt = get_format(name)
    largest = torch.finfo(torch.float32).max
    big = torch.tensor([fmt.max, fmt.min, largest, -largest, torch.inf, -torch.inf])
    want = torch.tensor([fmt.max, fmt.min] * 3)
    assert torch.equal(round_to(big, name, "nearest-even"), want)
    assert torch.equal(decode(encode(big, name, "nearest-even"), name), want)
    zeros = round_to(torch.tensor([0.0, -0.0]), name, "nearest-even")
    if 0 in fmt.grid:
        assert zeros.tolist() == [0, 0]
        assert zeros.signbit().tolist() == [False, fmt.negative_zero is not None]
    nan = torch.tensor([torch.nan, -torch.nan])
    assert round_to(nan, name, "nearest-even").isnan().all()
    decoded = decode(encode(nan, name, "nearest-even"), name)
    if fmt.nan_code is not None:
        assert decoded.isnan().all()
    else:  # no silent NaN: the caller carries it in the scale
        assert decoded.tolist() == [fmt.max, fmt.max]


@pytest.mark.parametrize("name", FORMATS)
def test_native_encoders(name: str) -> None:
    fmt = get_format(name)
    own = fmt.encoder_thresholds
    if own is None:
        with pytest.raises(FormatError, match="publishes no encoder thresholds"):
            fmt.thresholds("native")
        return
    assert own.dtype == np.float32 and len(own) == len(fmt.grid) - 1 and (np.diff(own) > 0).all()
    middle = (fmt.grid[:-1] + fmt.grid[1:]) / 2
    assert np.abs(own - middle).max() < 1e-6, "published constants are midpoints, roughly rounded"
    x = near_decisions(fmt)
    rank = (x.numpy()[:, None] >= own[None]).sum(1)
    assert np.array_equal(round_to(x, name, "native").numpy(), fmt.grid[rank].astype(np.float32))
