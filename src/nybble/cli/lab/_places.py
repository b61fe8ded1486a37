"""What the lab's commands have in common."""

from __future__ import annotations

from typing import Annotated

import typer

STORE = "lab.sqlite"
"""The store that is meant where none is named: a file in the folder we are in."""
Place = Annotated[
    str, typer.Option("--store", help="Where runs are kept: a SQLite file, or postgresql://USER:PASSWORD@HOST/DB.")
]
Name = Annotated[str | None, typer.Argument(metavar="[SWEEP]", help="A sweep's name; left out: all runs.")]
Where = Annotated[
    list[str] | None, typer.Option(help="Only these: 'bits<=4', 'weights=int4*', 'state!=done'; repeatable, all hold.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
