"""Runs as a Parquet file, which any table tool reads, and stores made one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nybble.core.errors import FileError, UsageError
from nybble.core.files import atomic_file, check_new_file
from nybble.lab.claim import packed, unpacked
from nybble.lab.store import Store

FORMAT = b"nybble-lab"
VERSION = b"1"
TEXTS = ("spec", "result", "environment", "sweeps")
"""Columns of JSON."""
COLUMNS = ("key", "kind", "state", "error", "seconds", "finished")


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError("Parquet files need pyarrow: pip install 'nybble[lab]'") from error
    return pyarrow, pyarrow.parquet


def export(store: Store, path: Path, sweep: str | None = None) -> int:
    """Write the runs that are over (of a sweep, or all), with the sweeps that they are of; how many.

    Columns: key, kind, state, error, seconds, finished; spec, result and environment as JSON; sweeps, a JSON mapping
    of each sweep's name to the run's labels in it. What the YAML files said is in the file's metadata.

    Raises:
        UsageError: pyarrow is missing, or nothing is over yet. FileError: the file can't be written.
    """
    arrow, parquet = _arrow()
    check_new_file(path)
    sources = store.sweeps()
    names = [sweep] if sweep is not None else list(sources)
    labels = {name: store.members(name) for name in names}
    rows = [
        {
            **{name: run[name] for name in COLUMNS},
            "spec": json.dumps(run["spec"]), "result": json.dumps(packed(run["result"])),
            "environment": json.dumps(run["environment"] or {}),
            "sweeps": json.dumps({name: labels[name][run["key"]] for name in names if run["key"] in labels[name]}),
        }
        for run in store.runs(sweep, ("done", "failed", "illegal"))
    ]  # fmt: skip
    if not rows:
        raise UsageError("no run is over yet; there is nothing to export.")
    kinds = {name: arrow.float64() if name in ("seconds", "finished") else arrow.string() for name in rows[0]}
    about = {FORMAT: VERSION, b"sweeps": json.dumps({name: sources[name] for name in names}).encode()}
    table = arrow.Table.from_pylist(rows, schema=arrow.schema([*kinds.items()], metadata=about))
    with atomic_file(path) as file:
        parquet.write_table(table, file, compression="zstd")
    return len(rows)


def merge(store: Store, path: Path) -> tuple[int, int]:
    """Bring in the runs of a Parquet file; how many were taken, and how many are done here with another result.

    What is done here stays; what isn't, and is done there, is taken, whatever state it has here.

    Raises:
        FileError: it is no such file, or of a newer version. UsageError: pyarrow is missing.
    """
    rows, sources = read(path)
    here = {run["key"]: run for run in store.runs()}
    taken, other = [], 0
    for row in rows:
        known = here.get(row["key"])
        if known is None or (known["state"] != "done" and row["state"] == "done"):
            taken.append(row)
        elif known["state"] == row["state"] == "done" and packed(known["result"]) != packed(row["result"]):
            other += 1
    store.bring(taken, rows, sources)
    return len(taken), other


def read(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of a file that :func:`export` wrote, with JSON read, and its sweeps by name; errors as of ``merge``."""
    arrow, parquet = _arrow()
    try:
        table = parquet.read_table(path)
    except (OSError, arrow.ArrowException) as error:
        raise FileError(f"{path} can't be read as a Parquet file ({error}).") from error
    about = table.schema.metadata or {}
    if FORMAT not in about:
        raise FileError(f"{path} is a Parquet file, and none that `nybble lab export` wrote.")
    if int(about[FORMAT]) > int(VERSION):
        raise FileError(f"{path} is of a newer nybble (version {int(about[FORMAT])} of the file); update nybble.")
    return list(_decoded(table.to_pylist())), json.loads(about[b"sweeps"])


def _decoded(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        found = {**row, **{name: json.loads(row[name]) for name in TEXTS}}
        yield {**found, "result": unpacked(found["result"])}
