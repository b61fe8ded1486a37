"""Fits of training laws: the published constants come back from losses drawn from them."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import numpy as np
import pytest

from nybble.core.errors import DataError, NybbleError, UsageError
from nybble.lab.laws.fit import fit
from nybble.lab.laws.training import PUBLISHED
from nybble.lab.laws.trainings import layout_of, trainings, with_twins

pytest.importorskip("scipy", reason="scipy isn't installed: pip install 'nybble[search]'")
SIZES = (41e6, 85e6, 154e6, 679e6)
TOKENS = (1e10, 2e10, 5e10, 1e11)
FORMATS = ("E0M7", "E1M1", "E2M1", "E1M3", "E4M3", "E5M2", "E6M1")
CONSTANTS = ("n", "alpha", "d", "beta", "eps", "gamma", "delta", "nu")


def grid(noise: float = 0.0, twins: bool = False, blocks: tuple[Any, ...] = (32, 128, "channel")) -> list[Any]:
    """The paper's grid, with losses of the published law times lognormal noise, shared by twins."""
    draws = np.random.default_rng(5)
    rows: list[Any] = []
    for size, tokens in itertools.product(SIZES, TOKENS):
        seed = math.exp(noise * draws.normal())
        twin = PUBLISHED.loss(size, tokens) * seed
        rows.append({"N": size, "D": tokens, "format": "bf16", "B": "", "loss": twin})
        for name, block in itertools.product(FORMATS, blocks):
            bits = layout_of(name)
            assert bits is not None
            exact = PUBLISHED.loss(size, tokens, *bits, block)
            row = {"N": size, "D": tokens, "format": name, "B": block}
            if twins:
                row |= {"loss": exact - PUBLISHED.loss(size, tokens) + twin, "twin": twin}
            else:
                row["loss"] = exact * math.exp(noise * draws.normal())
            rows.append(row)
    return rows


def test_all_constants_come_back_from_losses_without_noise() -> None:
    found = fit(trainings(grid(), PUBLISHED), draws=0)
    for name in CONSTANTS:
        assert found.constants[name] == pytest.approx(getattr(PUBLISHED, name), rel=1e-3), name
    assert found.rms < 1e-7 and found.held_out < 1e-6 and math.isnan(found.interval("nu")[0])


def test_predictions_come_back_through_noise_and_intervals_hold_them() -> None:
    """Constants of the data's part may move; losses may not (0.5 %)."""
    found = fit(trainings(grid(0.003), PUBLISHED), draws=12)
    law, *drawn = found.training_laws()
    for size, tokens, name in itertools.product((41e6, 1.2e9, 7e9), (1e10, 1e11), ("E2M1", "E4M3", "E1M2")):
        bits = layout_of(name)
        assert bits is not None
        true = PUBLISHED.loss(size, tokens, *bits, 128)
        assert law.loss(size, tokens, *bits, 128) == pytest.approx(true, rel=5e-3)
        assert np.median([each.loss(size, tokens, *bits, 128) for each in drawn]) == pytest.approx(true, rel=5e-3)
    assert found.rms == pytest.approx(0.003, rel=0.15)
    assert found.constants["delta"] == pytest.approx(PUBLISHED.delta, rel=0.03)
    low, high = found.interval("delta")
    assert low < found.constants["delta"] < high and high - low < 0.3


def test_twins_cancel_what_they_share() -> None:
    rows = grid(0.02, twins=True)
    assert fit(trainings(rows, PUBLISHED), draws=0).constants["nu"] == pytest.approx(PUBLISHED.nu, rel=1e-3)
    alone = fit(trainings([{**row, "twin": None} for row in rows], PUBLISHED), draws=0)
    assert abs(alone.constants["nu"] / PUBLISHED.nu - 1) > 5e-3


def test_twins_are_found_by_what_they_share() -> None:
    rows = [{**row, "seed": 1} for row in grid()]
    found = with_twins([*rows, {**rows[1], "seed": 2}], ["seed"])
    for row in found[:-1]:
        assert row["twin"] == PUBLISHED.loss(row["N"], row["D"])
    assert found[-1]["twin"] is None
    with pytest.raises(DataError, match="several trainings in high precision agree in N, D, seed"):
        with_twins([*rows, rows[0]], ["seed"])
    with pytest.raises(UsageError, match="no column 'sead'"):
        with_twins(rows, ["sead"])


def test_the_laws_beside_it_are_told_apart_on_runs_held_out() -> None:
    runs = trainings(grid(0.001, blocks=(128,)), PUBLISHED)
    found = {name: fit(runs, name, draws=0) for name in ("floating", "width", "constant")}
    assert found["floating"].held_out < 0.3 * found["width"].held_out < 0.3 * found["constant"].held_out
    with pytest.raises(UsageError, match="of the floating law"):
        found["width"].training_laws()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"take": 8}, "8 trainings are too few for a law of 8 constants"),
        ({"N": 1e6}, "N has one value, 1e+06"),
        ({"D": 1e9}, "D has one value, 1e+09"),
        ({"format": "E4M3", "B": 32}, "E has one value, 4"),
        ({"format": "bf16"}, "E has no value"),
        ({"B": 1}, "B is 1 everywhere"),
        ({"format": "int4"}, "row 1: a format is named by its exponent and mantissa bits"),
        ({"loss": "much"}, "row 1: could not convert"),
        ({"loss": ""}, "row 1: loss is a number above 0; got ''"),
        ({"B": "tensor", "format": "E2M1"}, "constants are unpublished"),
        ({"loss": None, "drop": "loss"}, "no column loss"),
        ({"drop": "B", "format": "E2M1"}, "no column B"),
    ],
)
def test_what_gives_no_law_is_refused(change: dict[str, Any], word: str) -> None:
    take, drop = change.pop("take", None), change.pop("drop", None)
    rows = [{name: value for name, value in {**row, **change}.items() if name != drop} for row in grid()[:take]]
    with pytest.raises(NybbleError, match=re.escape(word)) as refused:
        fit(trainings(rows, PUBLISHED), draws=0)
    assert isinstance(refused.value, DataError | UsageError)
