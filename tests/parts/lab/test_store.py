"""Stores: runs are claimed by one, finished once and never lost, on SQLite and on PostgreSQL."""

from __future__ import annotations

import math
import sqlite3
import threading
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, make_url, text
from tests.parts.lab.drawn import done, drawn, filled

from nybble.core.errors import FileError, NybbleError, StoreError, UsageError
from nybble.lab.claim import ATTEMPTS, Outcome, State
from nybble.lab.database import is_file
from nybble.lab.status import status
from nybble.lab.store import Store
from nybble.lab.tables import METADATA


def engine(place: str) -> Any:
    url = f"sqlite:///{place}" if is_file(place) else make_url(place).set(drivername="postgresql+psycopg")
    return create_engine(url)


def test_runs_are_claimed_in_order_and_finished_with_what_came_out(place: str) -> None:
    with filled(place) as store:
        claims = [store.claim("w") for _ in range(4)]
        assert [c and c.spec.options["weights"] for c in claims] == [*(f"int{b} group=16" for b in (2, 3, 4)), None]
        assert claims[0] is not None
        environment, result = {"torch": "2"}, {"sqnr": 1 / 3, "loss": math.inf, "name": "x", "none": None}
        assert store.finish(claims[0], replace(done(**result), environment=environment))
    with Store(place) as store:  # it is in the database
        row = next(store.runs("drawn"))
        assert row["result"] == result and row["environment"] == environment and row["labels"] == {"bits": 2}
        assert store.counts() == {"done": 1, "running": 2} and store.unfinished() == 2


def test_a_run_is_added_once(place: str) -> None:
    with filled(place) as store:
        claim = store.claim("w")
        assert claim is not None and store.finish(claim, done())
        more = drawn(bits=[2, 3, 4, 5])
        assert store.add("drawn", {}, more.expand()) == 1 and store.add("other", {}, more.expand()) == 0
        assert store.counts("other") == {"done": 1, "queued": 3}
        assert store.add("drawn", {}, drawn(bits=[5]).expand()) == 0  # a sweep that was cut down
        assert store.counts("drawn") == {"queued": 1} and sum(store.counts().values()) == 4


def test_a_pace_is_runs_a_minute(place: str) -> None:
    with filled(place) as store:
        claim = store.claim("w")
        assert claim is not None and store.finish(claim, Outcome(state="done", seconds=30.0))
        stands = status(store)
        assert stands.per_minute == pytest.approx(2, rel=0.1) and stands.minutes_left == pytest.approx(1, rel=0.1)


def test_a_silent_workers_run_is_taken_over_and_its_late_result_is_not(place: str) -> None:
    with filled(place, bits=[2]) as store:
        first = store.claim("dead", lease=-1.0)
        second = store.claim("alive")
        assert first is not None and second is not None and first.key == second.key and store.claim("third") is None
        assert not store.renew(first) and not store.finish(first, done(who="dead")) and store.renew(second)
        assert store.finish(second, done(who="alive")) and not store.finish(second, done(who="again"))
        assert [row["result"] for row in store.runs()] == [{"who": "alive"}]


def test_a_worker_that_lost_a_run_and_has_it_again_has_one_claim(place: str) -> None:
    with filled(place, bits=[2]) as store:
        first, second = store.claim("w", lease=-1.0), store.claim("w")
        assert first is not None and second is not None and first.number == second.number
        assert not store.finish(first, done()) and store.finish(second, done())


def test_a_renewed_lease_holds(place: str) -> None:
    with filled(place, bits=[2]) as store:
        claim = store.claim("slow", lease=-1.0)
        assert claim is not None and store.renew(claim, 60.0) and store.claim("other") is None


def test_a_run_that_kills_its_workers_is_given_up(place: str) -> None:
    with filled(place, bits=[2]) as store:
        for number in range(ATTEMPTS):
            assert store.claim(f"w{number}") is not None and store.release(f"w{number}") == 1
        assert store.claim("last") is None and store.counts() == {"failed": 1}
        assert "3 workers died" in store.reasons("failed")[0][0]
        assert store.retry() == 1 and store.claim("again") is not None


def test_an_interrupted_run_is_as_if_it_had_not_been_claimed(place: str) -> None:
    with filled(place, bits=[2]) as store:
        for _ in range(ATTEMPTS + 1):
            claim = store.claim("w")
            assert claim is not None
            store.put_back(claim)
        assert store.counts() == {"queued": 1}


def test_failures_keep_their_errors_and_only_retry_queues_them(place: str) -> None:
    with filled(place) as store:
        states: list[State] = ["failed", "failed", "illegal"]
        for state in states:
            claim = store.claim("w")
            assert claim is not None
            store.finish(claim, Outcome(state=state, error=f"{state} because"))
        assert store.reasons("failed") == [("failed because", 2)]
        store.add("drawn", {}, drawn().expand())
        assert store.claim("w") is None
        assert store.retry("drawn") == 3 and store.counts() == {"queued": 3}


def test_what_was_listed_as_illegal_is_queued_once_it_is_legal(place: str) -> None:
    members = drawn().expand()
    with Store(place) as store:
        store.add("drawn", {}, [replace(m, reason="not yet") for m in members])
        assert store.claim("w") is None and status(store, "drawn").illegal == [("not yet", 3)]
        store.add("drawn", {}, members)
        assert store.counts() == {"queued": 3}


def test_of_many_writers_each_gets_runs_of_its_own(place: str) -> None:
    got: Counter[str] = Counter()
    failed: list[BaseException] = []

    def work(name: str) -> None:
        try:
            with Store(place) as store:
                while (claim := store.claim(name)) is not None:
                    got[claim.key] += 1
                    assert store.finish(claim, done(who=name))
        except BaseException as error:
            failed.append(error)

    with filled(place, seed=list(range(20))) as store:
        threads = [threading.Thread(target=work, args=(f"w{i}",)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed and len(got) == 60 and set(got.values()) == {1} and store.counts() == {"done": 60}


def test_two_processes_may_make_a_store_at_once(place: str) -> None:
    failed: list[BaseException] = []

    def make() -> None:
        try:
            filled(place).close()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with Store(place) as store:
        assert not failed and store.counts() == {"queued": 3}


def test_migrations_make_the_tables_that_the_code_knows(place: str) -> None:
    """Alembic's own comparison finds no difference."""
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    Store(place).close()
    found = engine(place)
    with found.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []
    found.dispose()


def test_a_newer_schema_is_refused(place: str) -> None:
    filled(place).close()
    found = engine(place)
    with found.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = 'r9999'"))
    found.dispose()
    with pytest.raises(StoreError, match=r"'r9999', of a newer nybble.*Update nybble"):
        Store(place)


def test_another_database_is_left_alone(place: str) -> None:
    found = engine(place)
    with found.begin() as connection:
        connection.execute(text("CREATE TABLE customers (name TEXT)"))
    found.dispose()
    with pytest.raises(StoreError, match="customers"):
        Store(place)


def test_a_full_disk_is_said_and_loses_nothing(tmp_path: Path) -> None:
    """SQLite's own page limit stands for the disk: it gives the same error."""
    place = str(tmp_path / "lab.sqlite")
    with filled(place) as store:
        claim = store.claim("w")
        assert claim is not None
        with store._engine.connect() as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
            connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
        with pytest.raises(StoreError, match=r"the disk is full\. Free some space"):
            store.finish(claim, done(text="x" * 100_000))
        with pytest.raises(StoreError, match="the disk is full"):
            store.add("large", {}, drawn(seed=list(range(1000))).expand())
    with Store(place) as store:
        assert store.counts() == {"running": 1, "queued": 2}
        assert store.release("w") == 1 and store.claim("v") is not None


def test_a_lost_connection_is_said_and_the_next_call_has_another(server: Any, postgres: str) -> None:
    with filled(postgres, bits=[2]) as store:
        claim = store.claim("w")
        assert claim is not None
        server.psql(
            "select pg_terminate_backend(pid) from pg_stat_activity where backend_type = 'client backend' "
            "and pid <> pg_backend_pid()"
        )
        assert store.finish(claim, done(a=1)) and store.counts() == {"done": 1}


def test_a_database_that_is_not_there_is_said_without_its_password() -> None:
    pytest.importorskip("psycopg", reason="psycopg isn't installed: pip install 'nybble[test]'")
    with pytest.raises(StoreError, match="can't be reached") as error:
        Store("postgresql://me:secret@127.0.0.1:1/none?connect_timeout=2")
    assert "secret" not in str(error.value) and "me:***@" in str(error.value)


@pytest.mark.parametrize(
    ("named", "word"),
    [("mysql://a@b/c", "got mysql://"), ("://", "a store is a file, or postgresql"), ("none/x", "no folder none")],
)
def test_what_is_no_place_is_refused(named: str, word: str) -> None:
    with pytest.raises(NybbleError, match=word):
        Store(named)


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a database, " * 100)
    with pytest.raises(StoreError, match="no store of a lab"):
        Store(str(tmp_path / "notes.txt"))
    with pytest.raises(FileError, match="there is no store"):
        Store(str(tmp_path / "none"), create=False)
    assert not (tmp_path / "none").exists()
    with closing(sqlite3.connect(tmp_path / "empty")), pytest.raises(StoreError, match="no runs"):
        Store(str(tmp_path / "empty"), create=False)


def test_a_sweep_that_is_not_there_is_named(place: str) -> None:
    with filled(place) as store, pytest.raises(UsageError, match=r"no sweep 'drown'\. Did you mean 'drawn'"):
        store.check_sweep("drown")
