"""Bit-level scaling: curves whose best width is known come back with it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from nybble.cli import build
from nybble.core.errors import DataError, NybbleError, UsageError
from nybble.lab.laws.bit_level import Names, best_series, bits_per_parameter, families, shapes
from nybble.lab.rows import as_csv

NAMES = Names(total="total", family="family", error="se")
SIZES = (1e6, 2e6, 4e6, 8e6, 16e6, 32e6)
LOST = {3: 0.5, 4: 0.05, 8: 0.002, 16: 0.0}


def rows(noise: float = 0.0, repeats: int = 1, lost: dict[int, float] = LOST, se: float = 0.0) -> list[dict[str, Any]]:
    """A loss of ``6 - 0.15 log2 N``, and what a width loses on top."""
    draws = np.random.default_rng(2)
    return [
        {
            "family": "one",
            "bits": k,
            "parameters": n,
            "total": n * bits_per_parameter(k, 64),
            "nll": 6 - 0.15 * math.log2(n) + lost[k] + noise * draws.normal(),
            "se": se,
        }
        for k in lost
        for n in SIZES
        for _ in range(repeats)
    ]


def test_bits_of_a_parameter_are_the_papers() -> None:
    assert bits_per_parameter(4, 64) == 4.25 and bits_per_parameter(4, 1024) == 4 + 16 / 1024
    assert bits_per_parameter(4, 64, 0.02) == 4 + 16 / 64 + 0.02 * 12 and bits_per_parameter(16) == 16
    for wrong in ((0, 64, 0.0), (4, 0, 0.0), (4, 64, 1.0)):
        with pytest.raises(UsageError, match="k is 1 to 16"):
            bits_per_parameter(*wrong)


def test_the_best_width_and_what_others_lose_at_equal_bits() -> None:
    """At equal bits a width k has a model of 2^-log2(bits) the size: 0.15 nats a halving."""
    cells = families(rows(), NAMES)["one"]
    best = best_series(cells, "one", draws=3)
    within = [series for bits, series, _ in best.budgets if 1e6 * 4.25 <= bits <= 32e6 * 4.25]
    assert best.series == "4" and not best.repeated and set(within) == {"4"}
    over_8 = [series for bits, series, _ in best.budgets if 1e6 * 8.25 <= bits <= 32e6 * 8.25]
    at_8 = 0.15 * math.log2(8.25 / 4.25) - (LOST[4] - LOST[8])  # wherever a 4-bit model is as large
    assert best.excess["8"] == pytest.approx(at_8 * over_8.count("4") / len(over_8), abs=1e-9)
    assert best.excess["4"] == pytest.approx(0, abs=1e-9)
    upside_down = families([{**row, "nll": -row["nll"]} for row in rows()], NAMES)["one"]
    assert best_series(upside_down, "one", high=True, draws=1).series == "4"


@pytest.mark.parametrize(("repeats", "se"), [(4, 0.0), (1, 0.05)])
def test_how_sure_it_is_falls_with_noise(repeats: int, se: float) -> None:
    close = {4: 0.05, 5: 0.05 - 0.15 * math.log2(5.25 / 4.25) + 0.001}
    sharp = best_series(families(rows(0.0, repeats, LOST), NAMES)["one"], "one", draws=200)
    vague = best_series(families(rows(0.05, repeats, close, se), NAMES)["one"], "one", draws=200)
    assert sharp.sure["4"] == 1 and vague.repeated and 0.02 < vague.sure[vague.series] < 0.99
    assert sum(vague.sure.values()) == pytest.approx(1)


def test_parallel_curves_fit_where_a_power_law_does_not() -> None:
    found = shapes(families([{**row, "nll": math.exp(row["nll"])} for row in rows()], NAMES)["one"])
    assert found.parallel == pytest.approx(1) and found.power < 0.98
    level = {k: lost + 0.15 * math.log2(bits_per_parameter(k, 64)) for k, lost in LOST.items()}
    for k in LOST:
        assert found.offsets[str(k)] == pytest.approx(level[k] - level[3], abs=1e-6)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"parameters": 1e6, "total": 4e6}, "no series of bits has two sizes"),
        ({"bits": 4}, "are mixed; name what differs in --by"),
        ({"nll": None}, "no series of bits has two sizes"),
    ],
)
def test_what_makes_no_curve_is_refused(change: dict[str, Any], word: str) -> None:
    with pytest.raises(NybbleError, match=re.escape(word)):
        families([{**row, **change} for row in rows()], NAMES)


def test_curves_apart_or_of_too_few_points_are_refused() -> None:
    apart = [{**row, "total": row["total"] * 1e4 ** row["bits"]} for row in rows()]
    with pytest.raises(DataError, match="no two curves lie over each other"):
        best_series(families(apart, NAMES)["one"], "one")
    with pytest.raises(DataError, match="6 points above 0 are too few for 4 parallel curves"):
        shapes({k: cells[:1] if k != "4" else cells[:3] for k, cells in families(rows(), NAMES)["one"].items()})


def test_the_command_reads_draws_and_tells(tmp_path: Path) -> None:
    path, picture = tmp_path / "runs.csv", tmp_path / "curves.svg"
    path.write_text(as_csv(rows(0.001, 2), ("family", "bits", "parameters", "total", "nll", "se")))
    line = ["lab", "kbit", str(path), "--family", "family", "--total", "total", "--draws", "50"]
    done = CliRunner().invoke(build(), [*line, "--plot", str(picture), "--json"])
    assert done.exit_code == 0, done.output
    (found,) = json.loads(done.stdout)["families"]
    assert found["series"] == "4" and found["sure"]["4"] == 1 and found["shapes"]["parallel"] > 0.99
    assert "one 16" in picture.read_text()
    shown = CliRunner().invoke(build(), line)
    assert shown.exit_code == 0 and "parallel curves: R²" in shown.stdout
    wrong = CliRunner().invoke(build(), [*line, "--y", "nil"])
    assert wrong.exit_code == 2 and "no column 'nil'. Did you mean 'nll'" in wrong.stderr.replace("\n", " ")


def test_paired_repeats_share_what_differs_between_texts() -> None:
    """Of two texts that differ much, a width that is a little better on both is surely better."""
    texts = {"a": 0.0, "b": 2.0}
    close = {4: 0.05, 5: 0.05 - 0.15 * math.log2(5.25 / 4.25) + 0.001}
    table = [
        {**row, "nll": row["nll"] + more, "text": text} for text, more in texts.items() for row in rows(lost=close)
    ]
    names = Names(total="total", family="family", paired="text")
    cells = families(table[::-1], names)["one"]
    assert best_series(cells, "one", draws=100).sure["4"] < 0.9
    assert best_series(cells, "one", draws=100, paired=True).sure["4"] == 1
    with pytest.raises(DataError, match="some models have 1 repeats and others 2"):
        best_series(families(table[:-1], names)["one"], "one", paired=True)
