"""``nybble lab report SWEEP OUT.html``: a sweep as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nybble.cli.lab._places import STORE, Place, Where
from nybble.core.errors import UsageError


def command(
    sweep: Annotated[str, typer.Argument(metavar="SWEEP", help="A sweep's name.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The HTML file to write.")],
    x: Annotated[str, typer.Option(help="Of the chart: a column with numbers.")] = "",
    y: Annotated[str, typer.Option(help="Of the chart: a result.")] = "",
    by: Annotated[str, typer.Option(help="Columns, commas between: a curve for each combination.")] = "",
    where: Where = None,
    store: Place = STORE,
) -> None:
    """Write a page: how the sweep stands, its curves, its runs, and why some failed or are illegal."""
    if bool(x) != bool(y):
        raise UsageError("a chart needs both --x and --y; leave both out for a page without one.")
    from nybble.lab.report import write_report
    from nybble.lab.store import Store

    names = [name.strip() for name in by.split(",") if name.strip()]
    with Store(store, create=False) as opened:
        count = write_report(opened, sweep, out, x=x, y=y, by=names, where=where or ())
    print(f"{out}: {count:,} runs; open it in any browser")
