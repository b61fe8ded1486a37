"""``nybble lab export OUT.parquet``: finished runs as one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nybble.cli._output import print_json
from nybble.cli.lab._places import STORE, Json, Name, Place


def command(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The Parquet file to write.")],
    sweep: Name = None,
    store: Place = STORE,
    json: Json = False,
) -> None:
    """Write finished runs as a Parquet file: any table tool reads it, and nybble lab merge brings it into a store."""
    from nybble.lab.parquet import export
    from nybble.lab.store import Store

    with Store(store, create=False) as opened:
        if sweep is not None:
            opened.check_sweep(sweep)
        count = export(opened, out, sweep)
    size = out.stat().st_size
    print_json({"out": str(out), "runs": count, "bytes": size}) if json else print(
        f"{out}: {count:,} runs, {size:,} bytes"
    )
