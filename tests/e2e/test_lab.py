"""``nybble lab``: from a YAML file to tables, pictures, pages and files, by its commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from nybble.cli import build
from nybble.lab.store import Store


def lab(*line: str, code: int = 0) -> str:
    done = CliRunner().invoke(build(), ["lab", *line])
    assert done.exit_code == code, done.output
    return done.stdout if code == 0 else done.stderr


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of two groups one that doesn't divide the columns."""
    monkeypatch.chdir(tmp_path)
    axes = {
        "bits": [3, 8],
        "weights": "int{bits} group={group}",
        "group": [16, 20],
        "distribution": ["normal", "laplace"],
    }
    made = {"name": "small", "kind": "tensor", "base": {"rows": 4, "columns": 32}, "grids": [axes]}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(made))
    return path


def test_a_sweep_from_its_file_to_its_page(sweep: Path, tmp_path: Path) -> None:
    listed = json.loads(lab("sweep", str(sweep), "--dry-run", "--json"))
    assert (listed["total"], listed["illegal"]) == (8, 4) and not (tmp_path / "lab.sqlite").exists()
    stands = json.loads(lab("sweep", str(sweep), "--json"))
    assert stands["counts"] == {"done": 4, "running": 0, "queued": 0, "failed": 0, "illegal": 4}
    assert "group=20 does not divide" in stands["illegal"][0][0]
    again = json.loads(lab("sweep", str(sweep), "--json"))
    assert again["counts"] == stands["counts"]
    with Store("lab.sqlite") as store:
        assert max(row["attempt"] for row in store.runs()) == 1  # nothing was run twice
    assert json.loads(lab("status", "small", "--json"))["sweeps"][0]["counts"] == stands["counts"]
    assert "small" in lab("status") and "small" in lab("status", "--watch")

    found: dict[str, Any] = json.loads(lab("query", "small", "--where", "state=done", "--sort", "sqnr", "--json"))
    assert found["of"] == 8 and [row["bits"] for row in found["rows"]] == [3, 3, 8, 8]
    assert found["rows"][0]["sqnr"] < found["rows"][3]["sqnr"]
    lab("query", "small", "--csv", "all.csv")
    assert Path("all.csv").read_text().count("\n") == 9
    line = ("--x", "result.bits", "--y", "sqnr", "--by", "distribution")
    assert "2 curves" in lab("plot", "small", "a.svg", *line)
    lab("report", "small", "a.html", *line)
    assert "nybble lab" in Path("a.html").read_text()

    pytest.importorskip("pyarrow", reason="pyarrow isn't installed: pip install 'nybble[test-lab]'")
    assert "8 runs" in lab("export", "a.parquet")
    assert "8 runs taken" in lab("merge", "a.parquet", "--store", "b.sqlite")
    one, other = (json.loads(lab("query", "small", "--store", name, "--json")) for name in ("lab.sqlite", "b.sqlite"))
    assert [{**row, "attempt": 1} for row in one["rows"]] == other["rows"]


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("status", "there is no store lab.sqlite"),
        ("query small --store none/x", "there is no store none/x"),
        ("sweep small.yaml --executor rays", "unknown executor 'rays'. Did you mean 'ray'"),
        ("sweep small.yaml --gpus 1", "--executor ray"),
        ("sweep small.yaml --workers 0", "workers is 0"),
        ("report small a.html --x bits", "needs both --x and --y"),
    ],
)
def test_what_is_asked_wrongly_is_said(sweep: Path, line: str, word: str) -> None:
    done = CliRunner().invoke(build(), ["lab", *line.split()])
    assert done.exit_code in (1, 2) and word in done.stderr.replace("\n", " ")
    assert not Path("lab.sqlite").exists() and not Path("a.html").exists()


def test_a_sweep_of_nothing_but_illegal_pairs_is_refused(sweep: Path) -> None:
    made = yaml.safe_load(sweep.read_text())
    sweep.write_text(yaml.safe_dump({**made, "grids": [{"weights": "int4 group=20"}]}))
    assert "none of its 1 runs is legal" in lab("sweep", str(sweep), code=2)
