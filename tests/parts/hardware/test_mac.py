"""What a unit computes and how wide it is: against the paper's widths, brute force, and ml_dtypes' numbers."""

from __future__ import annotations

import itertools
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from nybble.core.errors import DataError, FormatError, UsageError
from nybble.formats import format_names, get_format
from nybble.hardware.mac import MacUnit
from nybble.hardware.operand import Operand


def unit(weights: str, inputs: str | None = None, length: int = 4608) -> MacUnit:
    return MacUnit(weights=get_format(weights), inputs=get_format(inputs or weights), length=length)


@pytest.mark.parametrize(
    ("name", "stated", "exact"),
    # stated: the paper's text (E) and its formula for integers; exact: by hand, the largest magnitude squared x 4608
    [("e2m3", 26, 25), ("e3m2", 32, 31), ("e3m3_finite", 34, 33), ("int8", 30, 28), ("int4", 22, 19), ("e1m2", 20, 19)],
)
def test_widths_for_the_longest_dot_product_of_resnet_18(name: str, stated: int, exact: int) -> None:
    found = unit(name)
    assert (found.stated_bits, found.exact_bits) == (stated, exact)
    assert MacUnit(weights=found.weights, inputs=found.inputs).bits == exact
    assert MacUnit(weights=found.weights, inputs=found.inputs, accumulator="stated").bits == stated


@pytest.mark.parametrize("pair", [("e2m1", "e2m1"), ("e3m2", "int4"), ("int3", "int3"), ("e2m0_finite", "e3m1_finite")])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 7])
def test_the_largest_sums_fit_and_would_not_in_one_bit_less(pair: tuple[str, str], length: int) -> None:
    """Every sum of so many products, from the formats' own values."""
    found = unit(*pair, length=length)
    w, x = (get_format(name).grid for name in pair)
    products = {Fraction(a) * Fraction(b) / Fraction(2) ** found.lsb for a, b in itertools.product(w, x)}
    assert all(p.denominator == 1 for p in products)
    high, low = length * max(products), length * min(products)
    assert -(2 ** (found.bits - 1)) <= low and high < 2 ** (found.bits - 1)
    assert low < -(2 ** (found.bits - 2)) or high >= 2 ** (found.bits - 2)
    assert found.stated_bits >= found.bits
    assert found.product_bits == max(abs(int(p)) for p in products).bit_length()


def test_the_papers_width_of_floats_is_the_narrowest_for_powers_of_two() -> None:
    """With a mantissa, its formula loses nothing; of integers it is two bits wider than need be."""
    for length in (2, 16, 1024):
        assert all(unit(name, length=length).stated_bits == unit(name, length=length).bits for name in ("e2m1", "e3m3"))
        assert unit("int8", length=length).stated_bits == unit("int8", length=length).bits + 2


@pytest.mark.parametrize("name", [n for n in format_names() if get_format(n).bits <= 8])
def test_every_code_is_its_value_in_steps(name: str) -> None:
    fmt = get_format(name)
    try:
        operand = Operand(fmt)
    except FormatError as error:
        assert f"{name}: a unit would need" in str(error) and "(at most 40)" in str(error)
        assert name in ("float8_e8m0fnu", "dynamic8", "udynamic8") or "normal" in name or "float" not in name
        return
    encodable = fmt.encodable()
    for code, value in enumerate(fmt.values):
        step = operand.steps[code]
        if not np.isfinite(value):
            assert step is None
        elif encodable[code]:
            assert step is not None and Fraction(float(value)) == step * Fraction(2) ** operand.lsb
            assert abs(step) < 1 << operand.span
        else:
            assert step == 0 or Fraction(float(value)) == Fraction(step or 0) * Fraction(2) ** operand.lsb
    assert operand.special_codes == tuple(np.flatnonzero(~np.isfinite(fmt.values)))


@pytest.mark.parametrize(
    "pair",
    [("float8_e4m3fn", "float8_e4m3fn"), ("float8_e5m2", "float4_e2m1fn"), ("float6_e3m2fn", "float8_e3m4"),
     ("float8_e4m3fnuz", "float6_e2m3fn"), ("float8_e4m3b11fnuz", "int4"), ("uint4", "float8_e5m2fnuz")],
)  # fmt: skip
def test_dot_products_are_those_of_ml_dtypes(pair: tuple[str, str]) -> None:
    """Exactly: in float64 no product or sum of these is rounded."""
    found = unit(*pair, length=500)
    draw = np.random.default_rng(3)
    codes, values = [], []
    for name in pair:
        drawn = draw.integers(0, 1 << get_format(name).bits, 500).astype(np.uint8)
        dtype = np.dtype(getattr(ml_dtypes, name))
        if name == "int4":
            values.append(((drawn.astype(np.int64) ^ 8) - 8).astype(np.float64))
        elif name == "uint4":
            values.append(drawn.astype(np.float64))
        else:
            values.append(drawn.view(dtype).astype(np.float64))
        codes.append(drawn)
    keep = np.isfinite(values[0]) & np.isfinite(values[1]) & (values[0] != -8 if pair[0] == "int4" else True)
    keep &= values[1] != -8 if pair[1] == "int4" else True
    (w, x), (a, b) = ([each[keep] for each in codes], [each[keep] for each in values])
    sums = found.sums(w.tolist(), x.tolist())
    assert [found.value(total) for total, _ in sums] == np.cumsum(a * b).tolist()
    assert not any(invalid for _, invalid in sums)


def test_codes_that_are_no_number_are_remembered_and_add_nothing() -> None:
    fmt = get_format("float8_e4m3fn")
    one, nan = int(fmt.grid_codes[list(fmt.grid).index(1.0)]), fmt.nan_code
    assert nan is not None
    found = unit("float8_e4m3fn").sums([one, nan, one], [one, one, one])
    step = 2**18
    assert found == [(step, False), (step, True), (2 * step, True)]
    assert unit("float8_e5m2").sums([0x7C], [0x3C]) == [(0, True)]  # Inf


def test_sums_wrap_beyond_the_length_that_they_are_for() -> None:
    assert unit("int2", length=1).bits == 2
    assert unit("int2", length=1).sums([1] * 4, [1] * 4) == [(1, False), (-2, False), (-1, False), (0, False)]


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match=r"length=0: a dot product has at least one term"):
        unit("int4", length=0)
    with pytest.raises(FormatError, match=r"float8_e8m0fnu: a unit would need \d+ bits"):
        unit("int4", "float8_e8m0fnu")
    with pytest.raises(UsageError, match=r"nf4: the paper states widths of integers and eXmY floats; use accumulator"):
        _ = unit("nf4").stated_bits
    with pytest.raises(UsageError, match="accumulator='wide' is neither 'exact' nor 'stated'"):
        MacUnit(weights=get_format("int4"), inputs=get_format("int4"), accumulator="wide")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="2 weights and 1 inputs"):
        unit("int4").sums([1, 2], [1])
