"""A sweep as a page: how it stands, its curves, its rows, and what went wrong."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nybble.core.files import atomic_write_text, check_new_file
from nybble.core.versions import VERSION
from nybble.lab.curves import curves
from nybble.lab.rows import OWN, chosen, columns_of, flat, shown, varying
from nybble.lab.status import STATES, status
from nybble.lab.store import Store
from nybble.report.sweep import render

MOST = 500
"""Rows that the page shows; a query shows all."""


def write_report(
    store: Store, sweep: str, path: Path, *, x: str, y: str, by: Sequence[str] = (), where: Sequence[str] = ()
) -> int:
    """Write the page; how many runs it is about.

    Args:
        store: where the runs are.
        sweep: which.
        path: the HTML file.
        x: a column with numbers, or nothing for no chart.
        y: likewise, of what was measured.
        by: columns, a curve for each combination.
        where: conditions, all of which hold for what is shown.

    Raises:
        UsageError: no such sweep or column, nothing to draw, or Jinja2 is missing. FileError: it can't be written.
    """
    check_new_file(path)
    store.check_sweep(sweep)
    stands = status(store, sweep)
    rows = chosen(flat(store.runs(sweep)), where)
    drawn = curves([row for row in rows if row["state"] == "done"], x, y, by) if x and y else []
    names = [name for name in varying(rows) if name != "state"] or [n for n in columns_of(rows) if n not in OWN]
    ordered = chosen(rows, sort=[y]) if y else rows
    page = render(
        {
            "name": sweep, "version": VERSION, "counts": [(state, stands.counts[state]) for state in STATES],
            "line": stands.line(), "failed": _first_lines(stands.failed), "illegal": _first_lines(stands.illegal),
            "columns": names, "rows": [[shown(row.get(name)) for name in names] for row in ordered[:MOST]],
            "states": [row["state"] for row in ordered[:MOST]], "total": len(rows), "where": list(where),
            "x": x, "y": y, "curves": [_plain(dataclasses.asdict(curve)) for curve in drawn],
        }
    )  # fmt: skip
    atomic_write_text(path, page)
    return len(rows)


def _first_lines(reasons: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    return [(reason.split("\n", 1)[0], count) for reason, count in reasons]


def _plain(curve: dict[str, Any]) -> dict[str, Any]:
    """As JSON has it: no interval is none."""
    points = [
        {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in point.items()}
        for point in curve["points"]
    ]
    return {**curve, "points": points}
