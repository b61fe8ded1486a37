"""``nybble recipes --matrix``: what is legal works, what is not says why, and the table is complete."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch

from nybble.cli import main
from nybble.cli.recipes import grouped
from nybble.core.errors import NybbleError
from nybble.core.progress import Bars, Silent
from nybble.formats import format_names
from nybble.pipelines import matrix
from nybble.quantizer import Quantizer
from nybble.recipe import load_recipe, recipe_names
from nybble.solvers import Stats, Weight, make_solver
from nybble.solvers.rtn import Rtn

RECIPES = ("rtn", "minmax-fp", "fp-baseline")
KNOWN = ("block=4x16", "channel", "flat=24", "group=16", "plane", "rank1", "shifted", "tensor", "token")
FORMATS = ("int4", "uint4", "float4_e2m1fn", "udybit4")
UNSIGNED = {"uint4": " symmetric=false", "udybit4": " scale=minmax(offset=true)"}
BLOCKS = "or a scale a block: group, channel or block."
FACTORS = "{0} factors are {1} maxima (scale=absmax); {2} has none. Use a signed format, " + BLOCKS
RANK1_MINMAX = "uint4 rank1: " + FACTORS.format("rank1", "slice", "minmax")
RANK1_OFFSET = "udybit4 rank1: " + FACTORS.format("rank1", "slice", "minmax(offset=true)")
RANK1_SEARCH = " rank1: rank1 factors are slice maxima, so there is no clip value to search; use recipe rtn, " + BLOCKS
SHIFTED = {
    "uint4": "uint4 shifted: " + FACTORS.format("shifted", "column", "minmax"),
    "udybit4": "udybit4 has no exponent to take the shifts' width from; say shifted=3.",
}


def expected(recipe: str, name: str, granularity: str) -> str:
    """The rules, by hand: factors are for absmax alone."""
    if granularity == "rank1":
        if recipe == "fp-baseline":
            return RANK1_SEARCH
        return {"uint4": RANK1_MINMAX, "udybit4": RANK1_OFFSET}.get(name, "")
    if granularity == "shifted" and name in SHIFTED:
        return SHIFTED[name]
    return ""


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """All rows take minutes; those of a few don't depend on the others."""
    torch.set_num_threads(1)
    assert set(RECIPES) <= set(recipe_names()) and set(FORMATS) <= set(format_names())
    return matrix.legal_combinations(RECIPES, FORMATS)


def test_every_combination_has_its_row_and_reason(rows: list[dict[str, Any]]) -> None:
    wanted = list(itertools.product(RECIPES, FORMATS, matrix.GRANULARITIES))
    assert [(row["recipe"], row["format"], row["granularity"]) for row in rows] == wanted
    assert set(KNOWN) <= {row["granularity"] for row in rows}
    for row in rows:
        if row["granularity"] not in KNOWN:
            continue  # one that came later
        reason = expected(row["recipe"], row["format"], row["granularity"])
        assert row["reason"].endswith(reason) and bool(row["reason"]) == bool(reason), row


def test_a_row_says_what_happens_to_another_weight(rows: list[dict[str, Any]]) -> None:
    """On a matrix of another size, through the solver alone: legal rows solve, impossible ones raise their reason."""
    generator = torch.Generator().manual_seed(5)
    weight, x = torch.randn(12, 48, generator=generator), torch.randn(96, 48, generator=generator)
    stats = Stats(second_moment=x.T @ x / 96, inputs=x)
    seen = set()
    for row in rows:
        if row["recipe"] == "fp-baseline" and row["granularity"] not in ("channel", "rank1"):
            continue  # its search is slow
        step = load_recipe(row["recipe"]).solver
        solver = make_solver(step.name, step.options)
        said = ""
        try:
            quantizer = Quantizer(f"{row['format']} {row['granularity']}{UNSIGNED.get(row['format'], '')}")
            solver.quantizer_for(quantizer)
            solved = solver.solve([Weight(name="w", matrix=weight, quantizer=quantizer)], stats)[0]
            assert solved.weight.shape == (12, 48) and 0 < solved.error < 1
        except NybbleError as error:
            said = str(error)
        assert bool(said) == bool(row["reason"]), (row, said)
        seen.add(bool(said))
    assert seen == {True, False}


class Counted(Silent):
    """Steps that were reported, and those that were announced."""

    def __init__(self) -> None:
        self.total, self.steps = 0, 0

    def start(self, total: int, what: str) -> None:
        """Keep how many there will be."""
        self.total += total

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count."""
        self.steps += n


def test_recipes_that_share_a_solver_share_its_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    tried, bars, solve = list[str](), Counted(), Rtn.solve

    def counted(self: Rtn, *given: Any) -> Any:
        tried.append(self.scale)
        return solve(self, *given)

    monkeypatch.setattr(Rtn, "solve", counted)
    recipes = ("rtn", "omniquant", "efficientqat", "mse", "adaround")
    rows = matrix.legal_combinations(recipes, ["int4", "int8"], bars)
    assert bars.total == bars.steps == len(recipes) * 2
    legal = {(r["recipe"], r["format"], r["granularity"]) for r in rows if not r["reason"]}
    own = {(name, at) for recipe, name, at in legal if recipe in recipes[:3]}
    searched = {(name, at) for recipe, name, at in legal if recipe in recipes[3:]}
    assert tried.count("") == len(own) and len(tried) - tried.count("") == len(searched)
    assert {scale for scale in tried if scale} == {"mse(grid=1,high=1.6)"}  # its smallest search


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    monkeypatch.setattr("sys.argv", ["nybble", "recipes", "--matrix", *options])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    return capsys.readouterr().out


def test_as_json_and_as_a_table(
    rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[Any] = []

    def known(recipes: object, progress: Any) -> list[dict[str, Any]]:
        shown.append(progress)
        return rows

    monkeypatch.setattr(matrix, "legal_combinations", known)
    assert json.loads(run(monkeypatch, capsys, "--json")) == {"combinations": rows}
    assert isinstance(shown[0], Bars)
    printed = run(monkeypatch, capsys)
    bad = [row for row in rows if row["reason"]]
    assert f"{len(rows)} combinations of recipe, format and granularity; {len(rows) - len(bad)} are legal" in printed
    body = [line for line in printed.splitlines() if line.startswith("│")]
    assert {row["granularity"] for row in bad} <= {cell for line in body for cell in line.replace(",", " ").split()}
    assert " ".join(RANK1_SEARCH.split()[1:4]) in printed
    covered = {(at, name, who) for ats, names, whos, _ in grouped(bad) for at in ats for name in names for who in whos}
    assert covered == {(row["granularity"], row["format"], row["recipe"]) for row in bad}
