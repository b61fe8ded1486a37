"""Ratios as m / 2^e: their error, both roundings against Python's integers, the float emulation against the shifts."""

from __future__ import annotations

from fractions import Fraction
from math import floor
from typing import Literal

import pytest
import torch

from nybble.core.errors import DataError, SchemeError, UsageError
from nybble.nn.integer.accumulators import check_fits, extremes
from nybble.nn.integer.dyadic import Dyadic

TIES: tuple[Literal["half-even", "half-up"], ...] = ("half-even", "half-up")


def ratios(count: int) -> torch.Tensor:
    drawn = torch.rand(count, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return 10 ** (-6 * drawn)


def test_a_million_ratios_have_full_mantissas_and_errors_of_31_bits() -> None:
    r = ratios(1_000_000)
    found = Dyadic.of(r)
    assert int(found.mantissa.min()) >= 2**30
    assert int(found.mantissa.max()) < 2**31
    assert bool(((found.value - r).abs() <= r * 2.0**-31).all())


def test_a_mantissa_that_rounds_up_to_one_stays_in_31_bits() -> None:
    found = Dyadic.of(1 - 2.0**-40)
    assert (int(found.mantissa), int(found.exponent)) == (2**30, 30)
    assert float(found.value) == 1


@pytest.mark.parametrize("ties", TIES)
def test_shifts_round_as_exact_fractions_do(ties: Literal["half-even", "half-up"]) -> None:
    drawn = torch.Generator().manual_seed(6)
    q = torch.randint(-(2**31) + 1, 2**31, (3000,), generator=drawn)
    r = torch.cat([ratios(2000), torch.tensor([0.5, 0.25, 2.0**-20, 2.0**-31, 1e-12]).double().repeat(200)])
    q[-1000::2] = q[-1000::2] // 2**20 * 2**19 + 2**18
    by = Dyadic.of(r, ties)
    exact = [
        Fraction(a * m, 2**e) for a, m, e in zip(q.tolist(), by.mantissa.tolist(), by.exponent.tolist(), strict=True)
    ]
    wanted = [round(f) if ties == "half-even" else floor(f + Fraction(1, 2)) for f in exact]
    assert by.apply(q).tolist() == wanted
    assert sum(f.denominator == 2 for f in exact) > 50  # ties are among them


@pytest.mark.parametrize("ties", TIES)
def test_the_float_emulation_is_the_integer_multiplication(ties: Literal["half-even", "half-up"]) -> None:
    q = torch.randint(-(2**31) + 1, 2**31, (1_000_000,), generator=torch.Generator().manual_seed(7))
    r = ratios(len(q))
    r[::4] = 2.0 ** -torch.arange(0, 40).repeat(6250).double()  # ties
    by = Dyadic.of(r, ties)
    assert torch.equal(by.simulate(q.double()), by.apply(q).double())


def test_products_that_a_float64_rounds_to_a_tie_are_told_from_ties() -> None:
    by = Dyadic(mantissa=torch.tensor(2**30 + 1), exponent=torch.tensor(31))
    q = torch.tensor([2**31 - 1, -(2**31) + 1])
    off = (q.double() * by.value) - torch.floor(q.double() * by.value)
    assert torch.equal(by.simulate(q.double()), by.apply(q).double()), off


def test_a_requantized_code_is_the_float_one_but_beside_ties() -> None:
    r, drawn = ratios(1_000_000), torch.Generator().manual_seed(8)
    q = torch.randint(-(2**27), 2**27, (len(r),), generator=drawn)
    y = q.double() * r
    differ = Dyadic.of(r, "half-even").apply(q).double() != torch.round(y)
    near = ((y - torch.floor(y)) - 0.5).abs() <= y.abs() * 2.0**-31
    assert bool((~differ | near).all())
    assert 0 < int(differ.sum()) < 5000  # about |y| 2^-30 of them


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan"), float("inf"), 2.0**30])
def test_what_is_no_ratio_is_refused(ratio: float) -> None:
    with pytest.raises(DataError, match="ratio of scales"):
        Dyadic.of(ratio)
    with pytest.raises(UsageError, match="half-up"):
        Dyadic.of(0.5, "up")  # type: ignore[arg-type]


def test_bounds_of_sums_are_reached_and_what_overflows_is_refused() -> None:
    w = torch.randint(-127, 128, (5, 40), generator=torch.Generator().manual_seed(9))
    bias = torch.tensor([3, -4, 0, 100, -100])
    low, high = extremes(w, -128, 127, bias)
    most = torch.where(w > 0, 127, -128)
    least = torch.where(w > 0, -128, 127)
    assert torch.equal(high, (w * most).sum(1) + bias.clamp(min=0))
    assert torch.equal(low, (w * least).sum(1) + bias.clamp(max=0))
    # A part of the sum, or padding, leaves the others out:
    assert extremes(torch.tensor([[-2, 3]]), 5, 9) == (torch.tensor([-18]), torch.tensor([27]))
    check_fits(torch.tensor([-(2**31), 0]), torch.tensor([0, 2**31 - 1]), 32, "conv")
    for beyond in ((0, 2**31), (-(2**31) - 1, 0)):
        with pytest.raises(SchemeError, match=r"conv: .* beyond 32-bit"):
            check_fits(torch.tensor([beyond[0]]), torch.tensor([beyond[1]]), 32, "conv")
