"""``nybble lab plot SWEEP OUT.svg --x bits --y ppl``: curves with intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nybble.cli.lab._places import STORE, Place, Where


def command(
    sweep: Annotated[str, typer.Argument(metavar="SWEEP", help="A sweep's name.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The picture to write: .png, .svg or .pdf.")],
    x: Annotated[str, typer.Option(help="A column with numbers.")],
    y: Annotated[str, typer.Option(help="A column with numbers: a result.")],
    by: Annotated[str, typer.Option(help="Columns, commas between: a curve for each combination.")] = "",
    log: Annotated[str, typer.Option(help="Logarithmic axes: x, y or x,y.")] = "",
    where: Where = None,
    store: Place = STORE,
) -> None:
    """Draw what was measured against an axis; repeats give a mean with a bootstrapped interval."""
    from nybble.lab.curves import curves
    from nybble.lab.plot import plot
    from nybble.lab.rows import chosen, flat
    from nybble.lab.store import Store

    with Store(store, create=False) as opened:
        opened.check_sweep(sweep)
        rows = chosen(flat(opened.runs(sweep, ("done",))), where or ())
    found = curves(rows, x, y, _names(by))
    plot(found, out, x=x, y=y, title=sweep, log=_names(log))
    print(f"{out}: {len(found)} curves, {sum(p.count for curve in found for p in curve.points):,} runs")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
