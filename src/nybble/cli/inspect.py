"""``nybble inspect MODEL``: what every byte is for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nybble.cli._output import print_json, print_table
from nybble.core.errors import FileError
from nybble.models.named import check_model


def command(
    out: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="What nybble wrote (trained, too), another's quantized model, a .gguf file, a float model; a hub id.",
        ),
    ],
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="How each kind of packed weight is multiplied with on this machine's CPU.")
    ] = False,
    modules: Annotated[bool, typer.Option("--modules", help="A row for each quantized weight.")] = False,
) -> None:
    """Account for every byte of MODEL."""
    check_model(out)
    if "/" not in out and not out.startswith("demo:") and not Path(out).exists():
        raise FileError(f"there is no {out} here, and a hub id has a slash.")  # nobody waits for a network to say so
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
    print_table(out, ("what", "bytes", "share"), [*rows, ["total on disk", f"{found['total']:,}", "100.00 %"]])
    print(
        f"{found['parameters']:,} parameters, {found['quantized_parameters']:,} quantized: "
        f"{found['bits_per_quantized_weight']:.4f} bits each, "
        f"{found['bits_per_weight']:.4f} over everything stored"
    )
    if found["formats"]:
        alike = [[r["format"], str(r["weights"]), f"{r['elements']:,}", f"{r['bits']:.4f}"] for r in found["formats"]]
        print_table("formats of weights", ("format", "weights", "elements", "bits"), alike)
    if found.get("note"):
        print(found["note"])
    if kernels:
        shown = [
            [str(row["weights"]), row["format"], row["kernel"] or f"unpacked at every call: {row['reason']}"]
            for row in found["kernels"]
        ]
        if shown:
            print_table("how packed weights are multiplied with", ("weights", "format", "kernel"), shown)
        else:
            print("no packed weights: torch multiplies with all of them")
    if modules:
        roles = list(dict.fromkeys(role for module in found["modules"].values() for role in module["bytes"]))
        shown = [
            [
                name,
                m["format"],
                f"{m['elements']:,}",
                f"{m['bits']:.3f}",
                *(f"{m['bytes'].get(role, 0):,}" for role in roles),
            ]
            for name, m in found["modules"].items()
        ]
        print_table("quantized weights, and the bytes of each", ("name", "format", "elements", "bits", *roles), shown)
