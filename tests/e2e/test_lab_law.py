"""``nybble lab law``: forecasts of the published law, and fits of a CSV file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.parts.lab.laws.test_fit import grid
from typer.testing import CliRunner

from nybble.cli import build
from nybble.lab.laws.training import PUBLISHED
from nybble.lab.rows import as_csv


def law(*line: str, code: int = 0) -> str:
    done = CliRunner().invoke(build(), ["lab", "law", *line])
    assert done.exit_code == code, done.output
    return done.stdout if code == 0 else done.stderr.replace("\n", " ")


def found(*line: str) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(law(*line, "--json"))
    return made


def test_the_published_law_says_what_a_plan_costs() -> None:
    plan = ("--parameters", "1e9", "--tokens", "1e12", "--format", "float4_e2m1fn", "--bits", "4", "--compute", "1e21")
    made = found(*plan)
    assert made["forecast"]["critical_data"]["value"] == pytest.approx(0.393e12, rel=5e-3)
    assert made["forecast"]["harmful"] and "past 3.93e+11 tokens" in made["warnings"][0]
    assert made["forecast"]["penalty"]["value"] == pytest.approx(PUBLISHED.penalty(1e9, 1e12, 2, 1, 128))
    assert [row["format"] for row in made["forecast"]["layouts"]][:2] == ["E2M1", "E1M2"]
    assert made["forecast"]["best_bits_of_compute"]["low"] is None and "outside of 1e+10" in made["warnings"][1]
    assert "E2M1" in law(*plan)
    assert found("--compute", "1e23")["forecast"]["best_of_compute"]["bits"]["value"] == pytest.approx(4.72, abs=0.01)
    assert [line[:12] for line in found("--compute", "1e23")["warnings"]] == ["N = 1.72e+11", "D = 3.29e+11"]


def test_a_csv_file_is_fitted_and_drawn(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(as_csv(grid(0.003, blocks=(128,)), ("N", "D", "format", "B", "loss")))
    picture = tmp_path / "fit.svg"
    line = (str(path), "--draws", "5", "--parameters", "1e9", "--tokens", "1e11", "--format", "E2M1")
    made = found(*line, "--plot", str(picture))
    assert "measured = fitted" in picture.read_text()
    fits, loss = made["fits"], made["forecast"]["loss"]
    assert fits["floating"]["held_out"] < fits["width"]["held_out"] < fits["constant"]["held_out"]
    assert loss["value"] == pytest.approx(PUBLISHED.loss(1e9, 1e11, 2, 1, 128), rel=5e-3)
    assert loss["low"] < loss["high"] and fits["floating"]["runs"] == 128
    narrow = found(str(path), "--draws", "1", "--where", "format!=E6M1")
    assert narrow["forecast"] == {} and narrow["fits"]["floating"]["runs"] == 112


def test_what_is_asked_wrongly_is_said(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("N,D,format,B,loss\n1e6,1e9,E2M1,32,3.5\n")
    assert "1 trainings are too few" in law(str(path), code=1)
    path.write_text("N,D\n1,2,3\n")
    assert "row 1: 3 cells under a heading of 2" in law(str(path), code=1)
    path.write_text("")
    assert "CSV file with a heading" in law(str(path), code=1)
    assert "say what is planned" in law(code=2)
    assert "give DATA" in law("--tokens", "1e9", "--plot", "a.svg", code=2)
    assert "give DATA" in law("--tokens", "1e9", "--pair", "seed", code=2)
    assert "give --parameters" in law("--tokens", "1e9", "--format", "E4M3", code=2)
    assert "--bits compares" in law("--tokens", "1e9", "--bits", "4", code=2)
    assert "as E4M3 or bf16; got 'int4'" in law("--parameters", "1e9", "--format", "int4", code=2)
    assert "N is a number above 0" in law("--parameters", "-1", "--tokens", "1e9", code=2)
