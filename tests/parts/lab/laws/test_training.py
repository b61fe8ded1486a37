"""The floating-point training law: what Sun et al. 2025 (arXiv:2501.02423) state, and minima found by search."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.core.errors import UsageError
from nybble.lab.laws.training import COST, PUBLISHED

LAYOUTS = "E1M1 E2M1 E2M2 E3M2 E3M3 E4M3 E4M4 E5M4 E5M5 E6M5 E6M6 E7M6 E7M7 E8M7"
"""The paper's list for 3 to 16 bits."""


def test_the_best_layouts_are_the_papers() -> None:
    assert [f"E{e}M{m}" for e, m in map(PUBLISHED.best_layout, range(3, 17))] == LAYOUTS.split()
    assert PUBLISHED.gamma_rho == pytest.approx(160.697, rel=1e-5)
    assert PUBLISHED.gamma_data == pytest.approx(2.2433e-3, rel=1e-4)


@pytest.mark.parametrize(
    ("exponent", "mantissa", "tokens"), [(8, 7, 1730e12), (4, 3, 27.33e12), (2, 1, 0.393e12)]
)  # the paper quotes 1730T, 27T, 0.4T
def test_past_the_critical_data_size_the_loss_rises(exponent: int, mantissa: int, tokens: float) -> None:
    found = PUBLISHED.critical_data(1e9, exponent, mantissa, 128)
    assert found == pytest.approx(tokens, rel=5e-3)
    below, at, above = (PUBLISHED.loss(1e9, share * found, exponent, mantissa, 128) for share in (0.9, 1, 1.1))
    assert below > at < above


@pytest.mark.parametrize("compute", [1e21, 1e25])
@pytest.mark.parametrize("tokens", [1e10, 1e12, 1e15])
def test_the_best_width_at_fixed_data_is_a_searched_one(tokens: float, compute: float) -> None:
    bits = np.linspace(1, 16, 150001)
    size = compute / (COST * bits * tokens)
    law = PUBLISHED
    loss = law.n / size**law.alpha + tokens**law.beta / size**law.alpha * 7 / (
        law.gamma_rho * bits ** (law.delta + law.nu)
    )
    assert law.bits_for_data(tokens) == pytest.approx(float(bits[loss.argmin()]), abs=1e-3)


@pytest.mark.parametrize(
    ("compute", "bits"), [(1e21, 4.19), (1e23, 4.72), (1e25, 5.31), (1e27, 5.98), (1e29, 6.73), (1e31, 7.58)]
)
def test_the_best_of_a_compute_is_a_searched_one(compute: float, bits: float) -> None:
    law, width = PUBLISHED, np.linspace(3, 9, 1201)[:, None]
    found, size, tokens = law.best_of_compute(compute)
    assert found == pytest.approx(bits, abs=0.006)
    data = np.geomspace(tokens / 30, tokens * 30, 2001)
    sizes = compute / (COST * width * data)
    plain = law.n / sizes**law.alpha + law.d / data**law.beta
    loss = plain + data**law.beta / sizes**law.alpha * 7 / (law.gamma_rho * width ** (law.delta + law.nu))
    at = np.unravel_index(loss.argmin(), loss.shape)
    assert found == pytest.approx(float(width[at[0], 0]), abs=0.02) and tokens == pytest.approx(data[at[1]], rel=0.05)
    assert size * tokens * found * COST == pytest.approx(compute)
    assert law.bits_for_size(size, compute) == pytest.approx(found, rel=1e-9)  # both minima meet
    assert law.bits_for_data(tokens) == pytest.approx(found, rel=1e-9)


@given(st.floats(1e5, 1e12), st.floats(1e6, 1e15), st.integers(0, 8), st.integers(0, 10), st.sampled_from([2, 32, 512]))
def test_the_penalty_falls_with_size_and_bits_and_rises_with_data_and_blocks(
    size: float, tokens: float, exponent: int, mantissa: int, block: int
) -> None:
    def rho(scale_n: float = 1, scale_d: float = 1, e: int = 0, m: int = 0, b: int = 1) -> float:
        return PUBLISHED.penalty(size * scale_n, tokens * scale_d, exponent + e, mantissa + m, block * b)

    assert rho(2) < rho() < rho(1, 2) and rho(e=1) < rho() and rho(m=1) < rho() < rho(b=2)
    assert PUBLISHED.penalty(size, tokens, exponent, mantissa, 1) == 0
    assert PUBLISHED.critical_data(size, exponent, mantissa, 1) == math.inf


def test_a_scale_a_channel_is_as_good_as_the_papers_block() -> None:
    apart = [PUBLISHED.penalty(1e9, 1e11, 2, 1, block) for block in ("channel", 2**13)]
    assert apart[0] / apart[1] == pytest.approx(13.1567 / 13)


def test_the_effective_size_has_the_same_loss() -> None:
    law, (size, tokens, bits) = PUBLISHED, (2e9, 3e12, 4.5)
    rho = tokens**law.beta / size**law.alpha * 7 / (law.gamma_rho * bits ** (law.delta + law.nu))
    assert law.loss(law.effective_size(size, tokens, bits), tokens) == pytest.approx(law.loss(size, tokens) + rho)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ((0, 1e9, 4, 3, 128), "N is a number above 0; got 0"),
        ((1e9, -1, 4, 3, 128), "D is a number above 0; got -1"),
        ((1e9, 1e9, -1, 3, 128), "exponent bits are a whole number"),
        ((1e9, 1e9, 4, 2.5, 128), "mantissa bits are a whole number"),
        ((1e9, 1e9, 4, 3, 0), "a number of elements from 1 on"),
        ((1e9, 1e9, 4, 3, "row"), "channel, or tensor; got 'row'"),
        ((1e9, 1e9, 4, 3, "tensor"), "unpublished"),
    ],
)
def test_what_cannot_be_is_refused(values: tuple[float, float, int, int, int], word: str) -> None:
    with pytest.raises(UsageError, match=re.escape(word)):
        PUBLISHED.penalty(*values)
    with pytest.raises(UsageError, match="1 to 64 bits"):
        PUBLISHED.best_layout(0)
