"""How a sweep stands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from nybble.lab.store import Store

STATES = ("done", "running", "queued", "failed", "illegal")


@dataclass(frozen=True, kw_only=True)
class Status:
    """Of one sweep, or of all runs.

    Attributes:
        sweep: its name; empty: all. counts: state -> runs. failed, illegal: reasons, with runs each.
        per_minute: runs finished a minute, lately. minutes_left: at that pace; None: nothing was finished lately.
    """

    sweep: str
    counts: dict[str, int]
    failed: list[tuple[str, int]]
    illegal: list[tuple[str, int]]
    per_minute: float
    minutes_left: float | None

    @property
    def total(self) -> int:
        """Runs, those that can't be run left out."""
        return sum(count for state, count in self.counts.items() if state != "illegal")

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "total": self.total}

    def line(self) -> str:
        """All of it but the reasons, in a line."""
        parts = [f"{self.counts[state]:,} {state}" for state in STATES if self.counts.get(state)]
        text = f"{self.sweep or 'all runs'}: {', '.join(parts) or 'no runs'}"
        if self.minutes_left is not None and (self.counts.get("queued") or self.counts.get("running")):
            text += f"; {self.per_minute:.3g} a minute, {self.minutes_left:.2g} minutes left"
        return text


def status(store: Store, sweep: str | None = None) -> Status:
    """How a sweep stands now, or all runs; some aggregates of the database, whatever the number of runs."""
    counts = dict.fromkeys(STATES, 0) | store.counts(sweep)
    done, seconds = store.pace(sweep)
    pace = 60 * done / seconds if done else 0.0
    return Status(
        sweep=sweep or "", counts=counts, per_minute=pace,
        failed=store.reasons("failed", sweep) if counts["failed"] else [],
        illegal=store.reasons("illegal", sweep) if counts["illegal"] else [],
        minutes_left=(counts["queued"] + counts["running"]) / pace if pace else None,
    )  # fmt: skip


def statuses(store: Store) -> Iterator[Status]:
    """Of every sweep."""
    for name in store.sweeps():
        yield status(store, name)
