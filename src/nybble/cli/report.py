"""``nybble report OUT``: one page that shows what happened."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nybble.checkpoint.marked import check_quantized
from nybble.checkpoint.trained import is_trained
from nybble.cli._output import print_json


def command(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that nybble quantize or train wrote.")],
    out: Annotated[Path | None, typer.Option(help="The page to write; left out: report.html in OUT.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Write a self-contained HTML page about OUT: errors, bytes, samples; of training losses and answers."""
    if not is_trained(folder):
        check_quantized(folder)
    from nybble.pipelines.report import write_report

    found = write_report(folder, out)
    if json:
        print_json(found)
        return
    what = f"{found['updates']:,} updates" if "updates" in found else f"{found['layers']} layers"
    print(f"{found['report']}: {found['bytes'] / 1e3:,.0f} kB, {what}; open it in any browser")
    if "layers_report" in found:
        print(f"{found['layers_report']}: the model that came out; the first page leads there")
    if not found["evaluated"] and "updates" in found:
        print("It has no held-out losses: `nybble train ... --eval SRC` measures them before and after.")
    elif not found["evaluated"]:
        print("It has no quality numbers: `nybble quantize ... --eval SRC` measures them (builtin for text).")
