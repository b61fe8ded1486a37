"""Rows that laws and rankings are made of: a sweep in a store, a Parquet file of runs, or a CSV file."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nybble.core.errors import DataError, FileError
from nybble.core.files import disk_errors
from nybble.lab.rows import Table, chosen, flat


def read_rows(data: str, store: str, where: Sequence[str] = ()) -> Table:
    """Finished runs as rows; where they were judged by ``ppl`` and not by ``nll``, its logarithm, ``nll``, is added.

    Args:
        data: a file that ends in ``.csv`` (a heading, a row a run) or ``.parquet`` (of ``nybble lab export``), or the
            name of a sweep.
        store: where the sweep is.
        where: conditions, all of which hold.

    Raises:
        UsageError: no such sweep or column. FileError: a file can't be read. DataError: there is no row.
    """
    suffix = Path(data).suffix.lower()
    if suffix == ".csv":
        rows = _of_csv(Path(data))
    elif suffix == ".parquet":
        rows = _of_parquet(Path(data))
    else:
        rows = _of_sweep(data, store)
    _add_nll(rows)
    found = chosen(rows, where) if rows else []
    if not found:
        raise DataError(f"{data}: no finished run" + (f" with {', '.join(where)}." if where else "."))
    return found


def _add_nll(rows: Table) -> None:
    for row in rows:
        value = row.get("ppl")
        if "nll" not in row and isinstance(value, int | float) and 0 < value < math.inf:
            row["nll"] = math.log(value)


def _of_csv(path: Path) -> Table:
    with disk_errors(path):
        text = path.read_bytes()
    try:
        lines = csv.reader(text.decode("utf-8-sig").splitlines(), strict=True)
        heading, *rows = ([cell.strip() for cell in line] for line in lines if line)
    except (UnicodeDecodeError, csv.Error, ValueError) as error:
        raise FileError(f"{path} can't be read as a CSV file with a heading ({error}).") from error
    for number, row in enumerate(rows, 1):
        if len(row) != len(heading):
            raise FileError(f"{path}, row {number}: {len(row)} cells under a heading of {len(heading)}.")
    return [{name: _value(cell) for name, cell in zip(heading, row, strict=True)} for row in rows]


def _of_parquet(path: Path) -> Table:
    from nybble.lab.parquet import read

    rows, _ = read(path)
    done = [row for row in rows if row["state"] == "done"]
    labels: list[dict[str, Any]] = [
        {name: value for of in row["sweeps"].values() for name, value in of.items()} for row in done
    ]
    return flat({**row, "labels": named, "attempt": 1} for row, named in zip(done, labels, strict=True))


def _of_sweep(name: str, place: str) -> Table:
    from nybble.lab.store import Store

    with Store(place, create=False) as store:
        store.check_sweep(name)
        return flat(store.runs(name, ("done",)))


def _value(cell: str) -> Any:
    """A number where it is one, None of an empty cell."""
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell or None
