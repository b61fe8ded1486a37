"""The estimate of a unit's LUTs, held to the units that were mapped (benchmarks/results/mac.json)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nybble.costs.mac import COEFFICIENTS, NAMES, features, fitted, luts
from nybble.formats import get_format
from nybble.hardware.mac import MacUnit

RESULT = Path(__file__).parents[3] / "benchmarks" / "results" / "mac.json"


def unit(weights: str, inputs: str, length: int = 4608) -> MacUnit:
    return MacUnit(weights=get_format(weights), inputs=get_format(inputs), length=length)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(RESULT.read_text(encoding="utf-8"))["units"]
    return found


def made(row: dict[str, Any]) -> MacUnit:
    return unit(row["weights"], row["inputs"], row["length"])


def test_what_was_mapped_is_what_is_said_here(rows: list[dict[str, Any]]) -> None:
    """Every width of the table is the unit's, every unit was played, and the pairs of equal width are all there."""
    assert all(row["accumulator"] == made(row).bits for row in rows)
    assert all(row["simulated"] > 60 and row["flops"] in (row["accumulator"], row["accumulator"] + 1) for row in rows)
    same = {row["weights"] for row in rows if row["weights"] == row["inputs"]}
    assert {f"int{bits}" for bits in range(3, 9)} < same and len(same) == 25


def test_the_estimate_is_near_every_mapped_unit(rows: list[dict[str, Any]]) -> None:
    """As near as its docstring says, and in their order."""
    counts = np.array([float(row["luts"]) for row in rows])
    ratios = np.array([luts(made(row)) for row in rows]) / counts
    assert abs(ratios - 1).max() < 0.18 and abs(ratios - 1).mean() < 0.06
    estimated, mapped = (np.argsort(np.argsort(v)).astype(float) for v in (ratios * counts, counts))
    assert np.corrcoef(estimated, mapped)[0, 1] > 0.97


def test_the_coefficients_are_the_fit(rows: list[dict[str, Any]]) -> None:
    assert fitted([(features(made(row)), row["luts"]) for row in rows]) == COEFFICIENTS
    assert len(NAMES) == len(COEFFICIENTS) == len(features(unit("int4", "nf4")))


def test_the_fit_finds_what_made_the_counts() -> None:
    units = [unit(a, b) for a in ("int4", "int8", "e2m1", "e3m4", "e5m2") for b in ("int6", "e2m3", "e4m3", "nf4")]
    given = (2.0, 0.5, 0.25, 1.0, 3.0)
    assert fitted([(features(u), float(np.dot(given, features(u)))) for u in units]) == pytest.approx(given, abs=0.001)


def test_what_is_counted() -> None:
    """By hand: factors of 2 and 7 bits; 11 bits of product in 2 stages (shifts of 0 to 2); a sum of 24 bits."""
    assert features(unit("e2m1", "int8")) == (14, 0, 22, 24, 4 + 16)
    assert features(unit("int8", "int8")) == (49, 49 * 4, 0, 28, 32)
    assert features(unit("e3m0_finite", "int8"))[:2] == (0, 0)  # shifts alone
    assert features(unit("float8_e4m3fn", "int8"))[4] - features(unit("e4m3_finite", "int8"))[4] == 8  # NaN
    assert features(unit("e1m2_finite", "e1m2_finite")) == (9, 0, 0, 19, 0)
    assert luts(unit("int4", "int4", 2)) < luts(unit("int4", "int4", 1 << 20))
