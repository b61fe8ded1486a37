"""``nybble export OUT DEST --target T``: files that others load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nybble.cli._output import megabytes, note, print_json, print_table
from nybble.core.files import check_new_folder
from nybble.export import REGISTRY, check_source


def command(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help="A folder that nybble quantize wrote, or another library's quantized model; c-train takes any.",
        ),
    ],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="Folder to write; must not exist.")],
    target: Annotated[
        str,
        typer.Option(
            help=f"What is to load it: {', '.join(REGISTRY.names())}; an option behind a colon (dense:float16). "
            "Left out: what OUT was quantized for (nybble quantize --target)."
        ),
    ] = "",
    check: Annotated[
        bool, typer.Option("--check", help="Open DEST with the libraries that load it; compare weights and logits.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Write OUT as vLLM, transformers and others load it."""
    check_new_folder(dest)
    if target:
        REGISTRY.check(target.partition(":")[0].lower())
    check_source(folder, target)
    from nybble.pipelines.export import export

    found = export(folder, dest, target, check=check, announce=note)
    if json:
        print_json(found)
        return
    print(
        f"{found['dest']}: {found['target']}, {megabytes(found['bytes'])} (OUT has {megabytes(found['source_bytes'])})"
    )
    if check:
        print_check(found["check"])


def print_check(found: dict[str, Any]) -> None:
    """What opening the result showed (:class:`nybble.export.Verified`)."""
    opened = ", ".join(f"{name} {version}" for name, version in found["opened_with"].items())
    print(f"opened with {opened}: {found['weights']} weights equal to the last bit in {found['exact_in']}")
    if found["cosine"] is not None:
        print(f"logits: cosine {found['cosine']:.8f}, largest difference {found['largest']:.2e} of the largest logit")
    if found["uncalled"]:
        print(f"logits not compared: {found['uncalled']}")
    rows = [
        [r["runtime"], r["since"] or "-", r["form"], r["weights"], r["inputs"], r["note"]] for r in found["runtimes"]
    ]
    if rows:
        print_table("who loads it", ("runtime", "since", "form", "weights", "inputs", "note"), rows)


def interrupted(dest: Path, **_: object) -> str:
    """What Ctrl-C left behind: nothing."""
    return f"interrupted; {dest} was not written."
