"""``nybble lab merge FILE.parquet ...``: runs of other stores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nybble.cli._output import print_json
from nybble.cli.lab._places import STORE, Json, Place


def command(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Files that nybble lab export wrote.")],
    store: Place = STORE,
    json: Json = False,
) -> None:
    """Bring finished runs of other stores into one; what is done there already stays as it is."""
    from nybble.lab.parquet import merge, read
    from nybble.lab.store import Store

    for file in files:  # all are looked at before the first is taken
        read(file)
    with Store(store) as opened:
        found = {str(file): merge(opened, file) for file in files}
    if json:
        rows = [{"file": name, "taken": taken, "differ": differ} for name, (taken, differ) in found.items()]
        print_json({"store": store, "files": rows})
        return
    for name, (taken, differ) in found.items():
        print(f"{name}: {taken:,} runs taken" + (f"; {differ:,} are done here with another result" if differ else ""))
