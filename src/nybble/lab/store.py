"""The runs of sweeps in a database: queued, claimed under a lease, finished once.

A claim holds while its worker says so (:meth:`Store.renew`). One that isn't renewed in time is anybody's, and what the
first worker comes with afterwards is not taken: a run has one result. All moves are single transactions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from sqlalchemy import Connection, Row, Select, delete, func, select, text, update
from sqlalchemy.dialects import postgresql, sqlite

from nybble.core.errors import FileError, StoreError, UsageError, did_you_mean
from nybble.lab.claim import ATTEMPTS, LEASE, Claim, Outcome, packed, unpacked
from nybble.lab.database import database_errors, insert_new, is_file, now, open_engine, shown
from nybble.lab.migrations import HEAD, migrate, schema_of
from nybble.lab.spec import RunSpec
from nybble.lab.sweep import Member
from nybble.lab.tables import MEMBERS, RUNS, SWEEPS

_LOCK = 0x6E79_6262
"""Of PostgreSQL, held while runs are added or the schema changes; "nybb"."""
_OPEN = ("queued", "running")


class Store:
    """An open store; closed at the end of a ``with``.

    Args:
        place: a SQLite file, made if it isn't there, or ``postgresql://...``.
        create: make what isn't there.

    Raises:
        StoreError: it can't be reached, isn't a store, or has a newer schema. UsageError: no such place.
    """

    def __init__(self, place: str, *, create: bool = True) -> None:
        self.place = str(place)
        if not create and is_file(self.place) and not Path(self.place).exists():
            raise FileError(f"there is no store {self.place}; `nybble lab sweep` makes one.")
        self._engine = open_engine(self.place)
        try:
            with self._reading() as connection:
                found = schema_of(connection)
            if found is None and not create:
                raise StoreError(f"{shown(self.place)}: there are no runs in it; `nybble lab sweep` makes some.")
            if found != HEAD:
                with self._writing(alone=True) as connection:
                    migrate(connection)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        """The store itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Give its connections back."""
        self._engine.dispose()

    # ------------------------------------------------------------------------------------------------ what is to run

    def add(self, name: str, source: Mapping[str, Any], members: Sequence[Member]) -> int:
        """Queue the runs of a sweep that aren't there yet, and make them its members.

        Runs that are known from whichever sweep are not run again. One that was listed as illegal is queued if it no
        longer is.

        Returns:
            How many are new.
        """
        runs = [
            {
                "key": m.spec.key, "kind": m.spec.kind, "spec": m.spec.to_dict(), "attempt": 0,
                "state": "illegal" if m.reason else "queued", "error": m.reason or None,
            }
            for m in members
        ]  # fmt: skip
        listed = [{"sweep": name, "key": m.spec.key, "labels": dict(m.labels)} for m in members]
        legal = {m.spec.key for m in members if not m.reason}
        with self._writing(alone=True) as connection:
            new = insert_new(connection, RUNS, runs)
            # what was refused before it was claimed; what only a worker found out is for retry()
            listed_only = select(RUNS.c.key).where(RUNS.c.state == "illegal", RUNS.c.attempt == 0)
            refused = connection.execute(listed_only).scalars()
            for key in [key for key in refused if key in legal]:
                connection.execute(update(RUNS).where(RUNS.c.key == key).values(state="queued", error=None))
            connection.execute(
                self._insert(SWEEPS).values(name=name, source=dict(source))
                .on_conflict_do_update(index_elements=["name"], set_={"source": dict(source)})
            )  # fmt: skip
            connection.execute(delete(MEMBERS).where(MEMBERS.c.sweep == name))
            insert_new(connection, MEMBERS, listed)
            connection.execute(text("ANALYZE"))  # or the first claims are planned as for an empty table
            return new

    def retry(self, sweep: str | None = None) -> int:
        """Queue again what failed, and what a worker found to be illegal; how many."""
        over = RUNS.c.state.in_(("failed", "illegal")) & (RUNS.c.attempt > 0)
        failed = _of(update(RUNS).where(over), sweep)
        with self._writing() as connection:
            return int(connection.execute(failed.values(state="queued", error=None, attempt=0)).rowcount)

    # ----------------------------------------------------------------------------------------------- what workers say

    def claim(self, worker: str, sweep: str | None = None, lease: float = LEASE) -> Claim | None:
        """The next run that is queued, or whose worker has gone silent; None where there is none."""
        with self._writing() as connection:
            while (found := self._next(connection, sweep)) is not None:
                this = RUNS.c.number == found.number
                if found.attempt < ATTEMPTS:
                    values = {"state": "running", "worker": worker, "attempt": found.attempt + 1, "error": None}
                    until = now(connection) + lease
                    connection.execute(update(RUNS).where(this).values(**values, lease_until=until))
                    return Claim(
                        number=found.number, key=found.key, worker=worker, attempt=found.attempt + 1,
                        spec=RunSpec.from_dict(found.spec),
                    )  # fmt: skip
                died = f"{ATTEMPTS} workers died of it, or were killed, without a word; retry it alone to see why."
                connection.execute(update(RUNS).where(this).values(state="failed", error=died, lease_until=None))
        return None

    def renew(self, claim: Claim, lease: float = LEASE) -> bool:
        """Say that a run is still being worked on; whether the claim still holds."""
        with self._writing() as connection:
            until = now(connection) + lease
            return connection.execute(_held(claim).values(lease_until=until)).rowcount == 1

    def finish(self, claim: Claim, outcome: Outcome) -> bool:
        """Keep what became of a run; whether it was taken: the claim may be another worker's by now."""
        with self._writing() as connection:
            return connection.execute(_held(claim).values(**_finished(connection, outcome))).rowcount == 1

    def deliver(self, key: str, outcome: Outcome) -> bool:
        """Keep a result that comes late, whoever holds the run now; whether it was taken: one that is done stays."""
        late = update(RUNS).where(RUNS.c.key == key, RUNS.c.state != "done")
        with self._writing() as connection:
            return connection.execute(late.values(**_finished(connection, outcome))).rowcount == 1

    def put_back(self, claim: Claim) -> None:
        """Queue a run again that was interrupted, as if it had not been claimed."""
        values = {"state": "queued", "attempt": claim.attempt - 1, "worker": None, "lease_until": None}
        with self._writing() as connection:
            connection.execute(_held(claim).values(**values))

    def release(self, worker: str) -> int:
        """End the claims of a worker that is known to be dead; how many. The next to ask gets them."""
        held = update(RUNS).where(RUNS.c.state == "running", RUNS.c.worker == worker)
        with self._writing() as connection:
            return int(connection.execute(held.values(lease_until=0.0)).rowcount)

    def unfinished(self, sweep: str | None = None) -> int:
        """How many runs are queued or running."""
        with self._reading() as connection:
            chosen = _of(select(func.count()).select_from(RUNS).where(RUNS.c.state.in_(_OPEN)), sweep)
            return int(connection.execute(chosen).scalar_one())

    # ------------------------------------------------------------------------------------------------ what is known

    def sweeps(self) -> dict[str, dict[str, Any]]:
        """Name -> what its YAML says."""
        with self._reading() as connection:
            return {row.name: row.source for row in connection.execute(select(SWEEPS).order_by(SWEEPS.c.name))}

    def check_sweep(self, name: str) -> None:
        """Raise UsageError where there is no sweep of this name."""
        known = self.sweeps()
        if name not in known:
            hint = did_you_mean(name, known) if known else " There is none yet."
            raise UsageError(f"{shown(self.place)}: there is no sweep {name!r}.{hint}")

    def counts(self, sweep: str | None = None) -> dict[str, int]:
        """State -> how many runs."""
        counted = _of(select(RUNS.c.state, func.count().label("runs")), sweep).group_by(RUNS.c.state)
        with self._reading() as connection:
            return {row.state: row.runs for row in connection.execute(counted)}

    def reasons(self, state: str, sweep: str | None = None) -> list[tuple[str, int]]:
        """Why runs failed or are illegal, and how many for each reason, the most first."""
        runs = func.count().label("runs")
        chosen = _of(select(RUNS.c.error, runs).where(RUNS.c.state == state), sweep)
        with self._reading() as connection:
            found = connection.execute(chosen.group_by(RUNS.c.error).order_by(runs.desc(), RUNS.c.error))
            return [(row.error or "", row.runs) for row in found]

    def pace(self, sweep: str | None = None, within: float = 600.0) -> tuple[int, float]:
        """How many runs were finished in the last seconds, and in how many seconds."""
        with self._reading() as connection:
            current = connection.execute(select(now(connection))).scalar_one()
            recent = _of(
                select(func.count().label("runs"), func.min(RUNS.c.finished - RUNS.c.seconds).label("first"))
                .where(RUNS.c.finished > current - within), sweep,
            )  # fmt: skip
            row = connection.execute(recent).one()
        return (row.runs, max(1e-3, current - max(row.first, current - within))) if row.runs else (0, 0.0)

    def runs(self, sweep: str | None = None, states: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
        """All that is known of runs, in their order: columns of the table, ``labels`` where a sweep is named."""
        if sweep is None:
            chosen: Select[Any] = select(RUNS)
        else:
            chosen = select(RUNS, MEMBERS.c.labels).join(MEMBERS, MEMBERS.c.key == RUNS.c.key)
            chosen = chosen.where(MEMBERS.c.sweep == sweep)
        if states:
            chosen = chosen.where(RUNS.c.state.in_(states))
        with self._reading() as connection:
            for row in connection.execute(chosen.order_by(RUNS.c.number)).mappings():
                yield {"labels": {}, **row, "result": unpacked(row["result"])}

    def bring(
        self, runs: Sequence[Mapping[str, Any]], members: Sequence[Mapping[str, Any]], sources: Mapping[str, Any]
    ) -> None:
        """Take over runs of another store, all or none, whatever is known of them here.

        Args:
            runs: ``key``, ``kind``, ``spec``, ``state``, ``error``, ``result``, ``environment``, ``seconds``,
                ``finished``.
            members: rows with ``key`` and ``sweeps``, name -> labels.
            sources: name -> a sweep.
        """
        names = ("key", "kind", "spec", "state", "error", "environment", "seconds", "finished")
        rows = [{**{n: run[n] for n in names}, "result": packed(run["result"]), "attempt": 1} for run in runs]
        listed = [{"sweep": n, "key": m["key"], "labels": labels} for m in members for n, labels in m["sweeps"].items()]
        with self._writing(alone=True) as connection:
            if rows:
                queue = self._insert(RUNS)
                taken = {name: queue.excluded[name] for name in (*names, "result") if name != "key"}
                connection.execute(
                    queue.on_conflict_do_update(index_elements=["key"], set_={**taken, "lease_until": None}), rows
                )
            for name, source in sources.items():
                known = self._insert(SWEEPS).values(name=name, source=source)
                connection.execute(known.on_conflict_do_nothing(index_elements=["name"]))
            insert_new(connection, MEMBERS, listed)

    def members(self, name: str) -> dict[str, dict[str, Any]]:
        """Key -> labels, of a sweep."""
        with self._reading() as connection:
            chosen = select(MEMBERS.c.key, MEMBERS.c.labels).where(MEMBERS.c.sweep == name)
            return {row.key: row.labels for row in connection.execute(chosen)}

    # ------------------------------------------------------------------------------------------------------- inside

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        with database_errors(self.place), self._engine.connect().execution_options(reads=True) as connection:
            yield connection

    @contextmanager
    def _writing(self, alone: bool = False) -> Iterator[Connection]:
        """A transaction; ``alone``: no other one of this kind meanwhile (of a SQLite file there never is)."""
        with database_errors(self.place), self._engine.begin() as connection:
            if alone and connection.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
            yield connection

    def _insert(self, table: Any) -> Any:
        return (sqlite if self._engine.dialect.name == "sqlite" else postgresql).insert(table)

    def _next(self, connection: Connection, sweep: str | None) -> Row[Any] | None:
        """The first run that may be claimed, locked until the transaction ends."""
        free = select(RUNS.c.number, RUNS.c.key, RUNS.c.attempt, RUNS.c.spec)
        silent = free.where(RUNS.c.state == "running", RUNS.c.lease_until <= now(connection))
        for kind in (silent, free.where(RUNS.c.state == "queued")):
            chosen = _of(kind, sweep).order_by(RUNS.c.number).limit(1).with_for_update(skip_locked=True, of=RUNS)
            if (found := connection.execute(chosen).first()) is not None:
                return found
        return None


def _of(statement: Any, sweep: str | None) -> Any:
    """Of a sweep's runs only."""
    if sweep is None:
        return statement
    member = select(MEMBERS.c.key).where(MEMBERS.c.sweep == sweep, MEMBERS.c.key == RUNS.c.key)
    return statement.where(member.exists())


def _held(claim: Claim) -> Any:
    """The run of a claim, as long as the claim holds."""
    return update(RUNS).where(
        RUNS.c.number == claim.number, RUNS.c.state == "running", RUNS.c.worker == claim.worker,
        RUNS.c.attempt == claim.attempt,
    )  # fmt: skip


def _finished(connection: Connection, outcome: Outcome) -> dict[str, Any]:
    """Columns of a run that is over."""
    return {
        "state": outcome.state, "result": packed(outcome.result), "error": outcome.error, "seconds": outcome.seconds,
        "environment": dict(outcome.environment), "finished": now(connection), "lease_until": None,
    }  # fmt: skip
