"""Runs as rows: conditions, order, columns, CSV."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

import pytest
from tests.parts.lab.drawn import done, filled

from nybble.core.errors import UsageError
from nybble.lab.rows import as_csv, chosen, flat, varying

ROWS: list[dict[str, Any]] = [
    {"bits": 2, "weights": "int2 group=16", "ppl": math.inf, "state": "done"},
    {"bits": 3, "weights": "int3 group=16", "ppl": 9.5, "state": "done"},
    {"bits": 4, "weights": "nf4", "ppl": 8.25, "state": "done"},
    {"bits": 8, "weights": "int8", "state": "failed", "error": "Out of memory\nTraceback"},
]


@pytest.mark.parametrize(
    ("where", "bits"),
    [
        (["bits<=3"], [2, 3]), (["bits>3", "state=done"], [4]), (["weights=INT*"], [2, 3, 8]), (["weights!=int*"], [4]),
        (["ppl<9.5"], [4]), (["ppl>=9.5"], [2, 3]), (["ppl=none"], [8]), (["ppl!=none", "bits!=2"], [3, 4]),
        (["bits=4.0"], [4]),
        (["weights = int2 group=16"], [2]), (["error=out*"], [8]), ([], [2, 3, 4, 8]),
    ],
)  # fmt: skip
def test_conditions(where: list[str], bits: list[int]) -> None:
    assert [row["bits"] for row in chosen(ROWS, where)] == bits


def test_order_and_limit() -> None:
    assert [row["bits"] for row in chosen(ROWS, sort=["ppl"])] == [4, 3, 2, 8]
    assert [row["bits"] for row in chosen(ROWS, sort=["-ppl"])] == [2, 3, 4, 8]  # without a value: last, either way
    assert [row["bits"] for row in chosen(ROWS, sort=["state", "-bits"], limit=2)] == [4, 3]


@pytest.mark.parametrize(
    ("where", "word"),
    [
        ("bts=2", r"no column 'bts'\. Did you mean 'bits'"),
        ("bits", "a condition is COLUMN=VALUE"),
        ("bits<x", "'x' is no number"),
    ],
)
def test_what_is_no_condition_is_refused(where: str, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        chosen(ROWS, [where])


def test_rows_of_runs_say_defaults_and_keep_axes_and_results_apart(tmp_path: Path) -> None:
    with filled(str(tmp_path / "lab.sqlite"), bits=[3], distribution=["normal", "laplace"]) as store:
        for number in range(2):
            claim = store.claim("w")
            assert claim is not None
            store.finish(claim, done(bits=4.0, sqnr=number / 3))
        rows = flat(store.runs("drawn"))
    assert [row["distribution"] for row in rows] == ["normal", "laplace"]
    assert [(row["bits"], row["result.bits"]) for row in rows] == [(3, 4.0), (3, 4.0)]
    assert varying(rows) == ["distribution", "sqnr"]
    read = [*csv.DictReader(io.StringIO(as_csv(rows, ["weights", "sqnr", "error"])))]
    assert [float(row["sqnr"]) for row in read] == [0.0, 1 / 3] and read[0]["error"] == ""
