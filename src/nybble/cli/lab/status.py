"""``nybble lab status``: how sweeps stand."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from nybble.cli._output import print_json, print_table
from nybble.cli.lab._places import STORE, Json, Name, Place

if TYPE_CHECKING:
    from rich.table import Table

    from nybble.lab.status import Status
    from nybble.lab.store import Store

SHOWN = 10
"""Reasons that are listed."""


def command(
    sweep: Name = None,
    store: Place = STORE,
    watch: Annotated[bool, typer.Option("--watch", help="Show it until nothing is left to run.")] = False,
    every: Annotated[float, typer.Option(help="With --watch: seconds from one look to the next.")] = 2.0,
    json: Json = False,
) -> None:
    """How many runs of each sweep are done, running, queued, failed or illegal, and why."""
    from nybble.lab.status import STATES
    from nybble.lab.store import Store

    with Store(store, create=False) as opened:
        if watch and not json:
            _watch(opened, sweep, every)
        found = _found(opened, sweep)
    if json:
        print_json({"sweeps": [each.to_dict() for each in found]})
        return
    if not watch:
        print_table("", ("sweep", *STATES, "a minute", "minutes left"), [_row(each) for each in found])
    for each in found:
        for word, reasons in (("failed", each.failed), ("illegal", each.illegal)):
            for reason, count in reasons[:SHOWN]:
                print(f"{each.sweep} {word}, {count:,}: {reason.splitlines()[0]}")


def interrupted(**_: object) -> str:
    """Nothing is left behind."""
    return "no longer watching; the runs go on."


def _found(store: Store, sweep: str | None) -> list[Status]:
    from nybble.lab.status import status, statuses

    if sweep is None:
        return list(statuses(store))
    store.check_sweep(sweep)
    return [status(store, sweep)]


def _row(found: Status) -> list[str]:
    from nybble.lab.status import STATES

    left = found.minutes_left if found.counts["queued"] or found.counts["running"] else None
    return [
        found.sweep, *(f"{found.counts[state]:,}" for state in STATES),
        f"{found.per_minute:.3g}" if found.per_minute else "", "" if left is None else f"{left:.2g}",
    ]  # fmt: skip


def _watch(store: Store, sweep: str | None, every: float) -> None:
    """A table that changes in place."""
    from rich.live import Live

    with Live(_table(_found(store, sweep)), auto_refresh=False) as live:
        while store.unfinished(sweep):
            time.sleep(every)
            live.update(_table(_found(store, sweep)), refresh=True)


def _table(found: list[Status]) -> Table:
    from rich.table import Table

    from nybble.lab.status import STATES

    table = Table()
    for name in ("sweep", *STATES, "a minute", "minutes left"):
        table.add_column(name, justify="left" if name == "sweep" else "right")
    for each in found:
        table.add_row(*_row(each))
    return table
