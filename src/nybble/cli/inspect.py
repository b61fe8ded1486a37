"""``nybble inspect OUT``: what every byte is for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nybble.checkpoint.marked import check_readable
from nybble.cli._output import print_json, print_table


def command(
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="A folder that nybble wrote, or another library's quantized model.")
    ],
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="How each kind of packed weight is multiplied with on this machine's CPU.")
    ] = False,
    modules: Annotated[bool, typer.Option("--modules", help="A row for each quantized weight.")] = False,
) -> None:
    """Account for every byte of OUT."""
    check_readable(out)
    from nybble.checkpoint.account import inspect

    found = inspect(out)
    if kernels:
        from nybble.pipelines.kernels import kernels_of

        found["kernels"] = kernels_of(out)
    if json:
        print_json(found)
        return
    rows = [
        [role, f"{count:,}", f"{100 * count / found['total']:.2f} %"]
        for role, count in sorted(found["bytes"].items(), key=lambda r: -r[1])
    ]
    print_table(str(out), ("what", "bytes", "share"), [*rows, ["total on disk", f"{found['total']:,}", "100.00 %"]])
    print(
        f"{found['parameters']:,} parameters, {found['quantized_parameters']:,} quantized: "
        f"{found['bits_per_quantized_weight']:.4f} bits each, "
        f"{found['bits_per_weight']:.4f} over everything stored"
    )
    if found.get("note"):
        print(found["note"])
    if kernels:
        shown = [
            [str(row["weights"]), row["format"], row["kernel"] or f"unpacked at every call: {row['reason']}"]
            for row in found["kernels"]
        ]
        print_table("how packed weights are multiplied with", ("weights", "format", "kernel"), shown)
    if modules:
        roles = list(dict.fromkeys(role for module in found["modules"].values() for role in module["bytes"]))
        shown = [
            [name, f"{m['elements']:,}", f"{m['bits']:.3f}", *(f"{m['bytes'].get(role, 0):,}" for role in roles)]
            for name, m in found["modules"].items()
        ]
        print_table("quantized weights, and the bytes of each", ("name", "elements", "bits", *roles), shown)
