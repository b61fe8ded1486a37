"""``nybble lab query``: runs as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nybble.cli._output import print_json, print_table
from nybble.cli.lab._places import STORE, Json, Name, Place, Where


def command(
    sweep: Name = None,
    store: Place = STORE,
    where: Where = None,
    columns: Annotated[str | None, typer.Option(help="Which, commas between; left out: those that differ.")] = None,
    sort: Annotated[str, typer.Option(help="By these, commas between; -ppl: the largest first.")] = "",
    limit: Annotated[int | None, typer.Option(help="At most so many rows.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write a CSV file instead, with numbers in full.")] = None,
    json: Json = False,
) -> None:
    """Axes and results of runs: a row a run."""
    from nybble.core.files import atomic_write_text, check_new_file
    from nybble.lab.rows import as_csv, check_columns, chosen, columns_of, flat, shown, varying
    from nybble.lab.store import Store

    if csv is not None:
        check_new_file(csv)
    with Store(store, create=False) as opened:
        if sweep is not None:
            opened.check_sweep(sweep)
        rows = flat(opened.runs(sweep))
    found = chosen(rows, where or (), [name for name in sort.split(",") if name], limit)
    names = [name.strip() for name in columns.split(",")] if columns else varying(found) or columns_of(found)
    check_columns(names, columns_of(rows))
    if csv is not None:
        atomic_write_text(csv, as_csv(found, names if columns else columns_of(found)))
    if json:
        kept = [{n: row[n] for n in names if n in row} if columns else row for row in found]
        print_json({"count": len(found), "of": len(rows), "rows": kept})
    elif csv is None:
        print_table("", names, [[shown(row.get(name)) for name in names] for row in found])
