"""Parquet files: what is exported can be read by others and merged, in any order, without losing a result."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tests.parts.lab.drawn import done, filled

from nybble.core.errors import FileError, UsageError
from nybble.lab.claim import Outcome
from nybble.lab.parquet import export, merge
from nybble.lab.store import Store

parquet: Any = pytest.importorskip("pyarrow.parquet", reason="pyarrow isn't installed: pip install 'nybble[test-lab]'")


def run_all(store: Store, **result: Any) -> None:
    while (claim := store.claim("w")) is not None:
        store.finish(claim, done(**result))


def content(store: Store) -> list[dict[str, Any]]:
    own = ("number", "worker", "attempt", "lease_until")
    rows = [{name: value for name, value in row.items() if name not in own} for row in store.runs("drawn")]
    return sorted(rows, key=lambda row: str(row["key"]))


def test_a_store_comes_back_as_it_was(place: str, tmp_path: Path) -> None:
    with filled(place) as store:
        claim = store.claim("w")
        assert claim is not None
        store.finish(claim, Outcome(state="failed", error="because", seconds=2.0, environment={"torch": "2"}))
        run_all(store, ppl=math.inf, sqnr=1 / 3, name="x")
        assert export(store, tmp_path / "a.parquet", "drawn") == 3
        with Store(str(tmp_path / "other.sqlite")) as other:
            assert merge(other, tmp_path / "a.parquet") == (3, 0) and merge(other, tmp_path / "a.parquet") == (0, 0)
            assert content(other) == content(store) and other.sweeps() == store.sweeps()


def test_others_read_it(tmp_path: Path) -> None:
    with filled(str(tmp_path / "lab.sqlite"), bits=[2]) as store:
        run_all(store, sqnr=0.5)
        export(store, tmp_path / "a.parquet")
    (row,) = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    assert json.loads(row["result"]) == {"sqnr": 0.5} and json.loads(row["sweeps"]) == {"drawn": {"bits": 2}}


def test_a_merge_takes_what_is_not_done_here_and_keeps_what_is(tmp_path: Path) -> None:
    with filled(str(tmp_path / "a.sqlite")) as there, filled(str(tmp_path / "b.sqlite")) as here:
        run_all(there, who="there")
        export(there, tmp_path / "a.parquet")
        first, second = here.claim("w"), here.claim("w")
        assert first is not None and second is not None
        here.finish(first, done(who="here"))
        assert merge(here, tmp_path / "a.parquet") == (2, 1)
        assert [row["result"]["who"] for row in here.runs()] == ["here", "there", "there"]
        assert not here.finish(second, done(who="late")) and here.unfinished() == 0


def test_what_is_no_export_is_refused(tmp_path: Path) -> None:
    with filled(str(tmp_path / "lab.sqlite")) as store:
        with pytest.raises(UsageError, match="no run is over yet"):
            export(store, tmp_path / "a.parquet")
        (tmp_path / "text").write_text("nothing")
        with pytest.raises(FileError, match="can't be read as a Parquet file"):
            merge(store, tmp_path / "text")
        import pyarrow

        parquet.write_table(pyarrow.table({"a": [1]}), tmp_path / "other.parquet")
        with pytest.raises(FileError, match="none that `nybble lab export` wrote"):
            merge(store, tmp_path / "other.parquet")
        newer = pyarrow.table({"a": [1]}).replace_schema_metadata({"nybble-lab": "9"})
        parquet.write_table(newer, tmp_path / "newer.parquet")
        with pytest.raises(FileError, match=r"newer nybble \(version 9"):
            merge(store, tmp_path / "newer.parquet")
    assert not (tmp_path / "a.parquet").exists()
