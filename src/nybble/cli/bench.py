"""``nybble bench MODEL``: tokens a second of a packed model, beside its unpacked self."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nybble.cli._output import print_json, print_table
from nybble.models.named import check_model


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder or file with packed weights.")],
    batch: Annotated[list[int] | None, typer.Option(help="Sequences written at once; repeatable. [1, 8]")] = None,
    prompt: Annotated[int, typer.Option(help="Tokens read at once.")] = 128,
    tokens: Annotated[int, typer.Option(help="Steps that are timed in each turn.")] = 8,
    rounds: Annotated[int, typer.Option(help="Turns; the medians over them are shown.")] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Write the result here too, as JSON.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Time MODEL."""
    check_model(model)
    from nybble.core.files import atomic_write_json, check_new_file
    from nybble.pipelines.bench import bench

    if out is not None:
        check_new_file(out)
    batches = batch or [1, 8]
    found = bench(model, batches=batches, prompt=prompt, tokens=tokens, rounds=rounds, device=device)
    if out is not None:
        atomic_write_json(out, found)
    if json:
        print_json(found)
        return
    rows = [
        [
            row["name"],
            f"{row['bytes'] / 1e6:,.0f}",
            f"{row['read']:,.1f}",
            *(f"{row['write'][str(b)]:,.1f}" for b in batches),
        ]
        for row in found["rows"]
    ]
    ratios = [
        "packed / fastest unpacked",
        "",
        *(f"{found['ratios'][what]:.2f}" for what in ("read", *map(str, batches))),
    ]
    columns = ("weights", "MB", f"reads {prompt}", *(f"writes, batch {b}" for b in batches))
    print_table(f"{model}: tokens a second, {found['threads']} threads on {device}", columns, [*rows, ratios])
    print("the packed model writes " + ("a token in one call" if found["one_call"] else "module by module"))
    for row in found["kernels"]:
        print(f"{row['weights']} x {row['format']}: {row['kernel'] or 'unpacked at every call: ' + row['reason']}")
