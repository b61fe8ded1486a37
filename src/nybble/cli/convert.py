"""``nybble convert A B --target T``: from any quantized model that nybble reads to any target that it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nybble.cli._output import megabytes, note, print_json, print_table
from nybble.cli.export import print_check
from nybble.core.files import new_folder
from nybble.core.progress import Bars
from nybble.export import REGISTRY
from nybble.models.named import check_model


def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="A quantized model: a folder of nybble, compressed-tensors, GPTQ, AWQ, bitsandbytes, ModelOpt or "
            "MXFP4 (gpt-oss), a .gguf file, a hub id.",
        ),
    ],
    dest: Annotated[Path, typer.Argument(metavar="B", help="Folder to write; must not exist.")],
    target: Annotated[
        str,
        typer.Option(
            help=f"What is to load it: {', '.join(REGISTRY.names())}; an option behind a colon (dense:float16, "
            "gguf:q4_k_m)."
        ),
    ],
    round: Annotated[
        str,
        typer.Option(
            metavar="auto|LINE",
            help="Round weights again that the target can't hold: auto to the nearest that it holds, LINE to a "
            "quantizer (int4 group=32). Left out: they are refused, and named.",
        ),
    ] = "",
    check: Annotated[
        bool, typer.Option("--check", help="Open B with the libraries that load it; compare weights and logits.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Write A as vLLM, llama.cpp, transformers and others load it, without changing a code."""
    new_folder(dest, model)
    REGISTRY.check(target.partition(":")[0].lower())
    check_model(model)
    from nybble.pipelines.convert import convert

    found = convert(model, dest, target, round=round, check=check, announce=note, progress=Bars())
    if json:
        print_json(found)
        return
    _print(found)
    if check:
        print_check(found["check"])


def _print(found: dict[str, Any]) -> None:
    print(f"{found['dest']}: {found['target']}, {megabytes(found['bytes'])} (A has {megabytes(found['source_bytes'])})")
    if not found["rounded"]:
        print("no weight was rounded again")
    rows = [
        [str(len(row["layers"])), row["layers"][0], row["from"], row["to"], _error(row["error"])]
        for row in (*found["recoded"], *found["rounded"])
    ]
    if rows:
        print_table("not as they were", ("layers", "first", "from", "to", "|W - W'|^2 / |W|^2"), rows)


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def interrupted(dest: Path, **_: object) -> str:
    """What Ctrl-C left behind: nothing."""
    return f"interrupted; {dest} was not written."
