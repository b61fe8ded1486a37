"""A sweep from its file to its results: expand, queue, run what isn't there yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nybble.core.errors import UsageError
from nybble.core.progress import Progress, Silent, task
from nybble.lab.executors import REGISTRY, Executor
from nybble.lab.outbox import send
from nybble.lab.status import Status, status
from nybble.lab.store import Store
from nybble.lab.sweep import Member, Sweep, load_sweep
from nybble.lab.worker import Patience

SHOWN = 10


def run_sweep(
    sweep: Sweep | str | Path,
    place: str | Path,
    *,
    executor: str | Executor = "local",
    options: Mapping[str, Any] | None = None,
    retry: bool = False,
    patience: Patience | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] = lambda line: None,
) -> Status:
    """Run what a sweep has and the store hasn't.

    Args:
        sweep: it, or its YAML file.
        place: a SQLite file, or ``postgresql://...``.
        executor: where workers run, by name or made.
        options: of an executor by name.
        retry: also what failed.
        patience: times.
        progress: told of runs as they are finished, by whichever process.
        announce: gets lines for people.

    Returns:
        How it stands when nothing is left to run.

    Raises:
        UsageError: the sweep is none, or all of it is illegal. StoreError: of the store; what was finished is kept.
    """
    made = sweep if isinstance(sweep, Sweep) else load_sweep(sweep)
    runner: Executor = REGISTRY.make(executor, options or {}) if isinstance(executor, str) else executor
    members = made.expand()
    check_some_legal(made, members)
    with Store(str(place)) as store:
        if late := send(store):
            announce(f"{late} results of an earlier run were brought in")
        new = store.add(made.name, made.to_dict(), members)
        if retry:
            announce(f"{store.retry(made.name)} runs that failed are queued again")
        stands = status(store, made.name)
        announce(f"{len(members):,} runs, {new:,} new. {stands.line()}")
        for reason, count in stands.illegal[:SHOWN]:
            announce(f"  left out, {count:,}: {reason}")
        with task(progress or Silent(), stands.total, made.name) as bar:
            seen = _Seen(store, made.name, bar)
            seen.look()
            if stands.counts["queued"] or stands.counts["running"]:
                runner.run(store, made.name, patience or Patience(), seen.look)
            seen.look()
        return status(store, made.name)


def check_some_legal(sweep: Sweep, members: list[Member]) -> None:
    """Raise UsageError where nothing of a sweep can be run."""
    if all(member.reason for member in members):
        raise UsageError(f"sweep {sweep.name}: none of its {len(members):,} runs is legal. {members[0].reason}")


class _Seen:
    """Tells a bar of runs that were finished since the last look."""

    def __init__(self, store: Store, sweep: str, bar: Progress) -> None:
        self._store, self._sweep, self._bar = store, sweep, bar
        self._count = 0

    def look(self) -> None:
        counts = self._store.counts(self._sweep)
        over = counts.get("done", 0) + counts.get("failed", 0)
        if over > self._count:
            failed = f"{counts['failed']} failed" if counts.get("failed") else ""
            self._bar.advance(over - self._count, failed)
            self._count = over
