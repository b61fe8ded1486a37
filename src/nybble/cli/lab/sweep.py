"""``nybble lab sweep FILE.yaml``: run what isn't there yet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nybble.cli._output import note, print_json, print_table
from nybble.cli.lab._places import STORE, Json, Place
from nybble.core.errors import UsageError


def command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A sweep in YAML: name, kind, base, grids, exclude.")],
    store: Place = STORE,
    workers: Annotated[int, typer.Option(help="Runs at a time.")] = 1,
    executor: Annotated[str, typer.Option(help="Where they run: local (processes of this machine), ray.")] = "local",
    gpus: Annotated[float, typer.Option(help="Of Ray: GPUs that a worker asks for; 0.5 shares one.")] = 0.0,
    address: Annotated[str, typer.Option(help="Of Ray: the cluster's; left out: RAY_ADDRESS, or this machine.")] = "",
    retry: Annotated[bool, typer.Option("--retry", help="Run what failed again.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List runs, and what is illegal; run nothing.")] = False,
    json: Json = False,
) -> None:
    """Run a sweep: what is in the store already isn't run again, so the same command goes on after any interruption."""
    from nybble.lab.sweep import load_sweep

    made = load_sweep(file)
    if dry_run:
        members = made.expand()
        rows = [{**m.spec.options, **m.labels, "reason": m.reason, "key": m.spec.key} for m in members]
        illegal = sum(bool(m.reason) for m in members)
        note(f"{made.name}: {len(members):,} runs, {illegal:,} of them illegal")
        if json:
            print_json({"sweep": made.name, "total": len(members), "illegal": illegal, "runs": rows})
        else:
            names = list(dict.fromkeys(name for row in rows for name in row if name != "key"))
            print_table("", names, [[str(row.get(name, "")) for name in names] for row in rows])
        return
    from nybble.core.progress import Bars
    from nybble.lab.run import run_sweep

    options: dict[str, object] = {"workers": workers}
    if executor == "ray":
        options |= {"gpus": gpus, "address": address}
    elif gpus or address:
        raise UsageError("--gpus and --address are Ray's: --executor ray.")
    stands = run_sweep(
        made, store, executor=executor, options=options, retry=retry, progress=Bars(), announce=note
    )  # fmt: skip
    if json:
        print_json(stands.to_dict())
        return
    print(stands.line())
    for reason, count in stands.failed:
        print(f"  failed, {count:,}: {reason.splitlines()[0]}")
    print(f"nybble lab query {made.name} --store {_quoted(store)}")


def interrupted(file: Path, **_: object) -> str:
    """What Ctrl-C left behind."""
    return f"interrupted. What was finished is kept; `nybble lab sweep {file}` with the same --store goes on."


def _quoted(store: str) -> str:
    """A store for a command that may be copied, without its password."""
    from nybble.lab.database import shown

    return shown(store)
