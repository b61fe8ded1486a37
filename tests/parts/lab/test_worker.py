"""Workers: everything that a run may come to is kept, and no run is lost with its worker, its store or its disk."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.parts.lab.drawn import drawn, filled

from nybble.core.errors import FileError, SchemeError, StoreError
from nybble.lab.claim import Outcome
from nybble.lab.executors import REGISTRY, Executor
from nybble.lab.executors.local import Local
from nybble.lab.kinds.tensor import DrawnTensor
from nybble.lab.outbox import keep, outbox_of, send
from nybble.lab.run import run_sweep
from nybble.lab.store import Store
from nybble.lab.worker import Patience, work

QUICK = Patience(poll=0.01, store=0.0)
Run = Callable[[DrawnTensor, Path], Mapping[str, Any]]


@pytest.fixture
def place(tmp_path: Path) -> str:
    return str(tmp_path / "lab.sqlite")


def runs_as(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    monkeypatch.setattr(DrawnTensor, "run", run)


def test_what_came_out_is_what_the_run_gives(place: str) -> None:
    with filled(place) as store:
        assert work(place, "drawn", "w", QUICK) == 3
        for row, member in zip(store.runs("drawn"), drawn().expand(), strict=True):
            assert row["result"] == member.spec.make().run(Path()) and row["seconds"] > 0
            assert {"torch", "python", "nybble", "cores"} <= row["environment"].keys()


def test_a_failure_keeps_its_error_and_an_illegal_pair_its_reason(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: DrawnTensor, folder: Path) -> Mapping[str, Any]:
        if "int2" in self.weights:
            raise SchemeError("2 bits don't go here.")
        if "int3" in self.weights:
            raise ZeroDivisionError("at the third")
        return {"left": len([*folder.iterdir()])}

    runs_as(monkeypatch, run)
    with filled(place) as store:
        work(place, "drawn", "w", QUICK)
        rows = {row["labels"]["bits"]: row for row in store.runs("drawn")}
    assert (rows[2]["state"], rows[2]["error"]) == ("illegal", "2 bits don't go here.")
    assert rows[3]["state"] == "failed" and rows[3]["error"].startswith("ZeroDivisionError: at the third\nTraceback")
    assert rows[4]["state"] == "done" and rows[4]["result"] == {"left": 0}


def test_an_interrupted_run_is_queued_again(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: DrawnTensor, folder: Path) -> Mapping[str, Any]:
        raise KeyboardInterrupt

    runs_as(monkeypatch, run)
    with filled(place) as store:
        with pytest.raises(KeyboardInterrupt):
            work(place, "drawn", "w", QUICK)
        assert store.counts() == {"queued": 3} and [row["attempt"] for row in store.runs()] == [0, 0, 0]


def test_a_long_run_keeps_its_lease(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The heart renews it: the run goes on until another process's clock has seen a renewal."""
    renewed = threading.Event()
    renew = Store.renew

    def noted(self: Store, *given: Any) -> bool:
        held = renew(self, *given)
        renewed.set()
        return held

    def run(self: DrawnTensor, folder: Path) -> Mapping[str, Any]:
        return {"renewed": renewed.wait(20)}

    monkeypatch.setattr(Store, "renew", noted)
    runs_as(monkeypatch, run)
    with filled(place, bits=[2]) as store:
        work(place, "drawn", "w", Patience(lease=0.2, poll=0.01))
        assert [row["result"] for row in store.runs()] == [{"renewed": True}]


def test_a_result_that_the_store_does_not_take_is_kept_and_brought_later(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with filled(place, bits=[2]) as store:
        with monkeypatch.context() as patched:
            patched.setattr(Store, "finish", _lost)
            with pytest.raises(StoreError, match=r"gone\. What was just finished is kept in .*outbox"):
                work(place, "drawn", "w", QUICK)
        (kept,) = outbox_of(place).iterdir()
        assert store.counts() == {"running": 1} and json.loads(kept.read_text())["state"] == "done"
        assert send(store) == 1 and not kept.exists() and send(store) == 0
        (row,) = store.runs()
        assert row["state"] == "done" and row["result"] == drawn(bits=[2]).expand()[0].spec.make().run(Path())
        keep(place, row["key"], Outcome(state="failed", error="another's"))
        assert send(store) == 1 and [*store.runs()] == [row]  # what is done stays
        for damaged in ("{", '{"state": "done"}'):
            kept.write_text(damaged)
            with pytest.raises(FileError, match="is damaged; remove it"):
                send(store)


def test_a_store_that_fails_is_told_of_at_once(
    place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once, on standard error, while the worker goes on trying."""
    claim, refusals = Store.claim, iter((StoreError("the disk is full."), StoreError("the disk is full.")))

    def refusing(self: Store, *given: Any) -> Any:
        for error in refusals:
            raise error
        return claim(self, *given)

    monkeypatch.setattr(Store, "claim", refusing)
    with filled(place):
        assert work(place, "drawn", "w", Patience(poll=0.01, store=30.0)) == 3
    assert capsys.readouterr().err == "nybble lab: the disk is full. Trying for 30 seconds; nothing is lost.\n"


def test_with_the_disk_full_of_both_the_run_is_run_again(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> None:
        raise FileError("the disk is full.")

    with filled(place, bits=[2]) as store:
        with monkeypatch.context() as patched:
            patched.setattr(Store, "finish", _lost)
            patched.setattr("nybble.lab.worker.keep", full)
            with pytest.raises(StoreError, match=r"has to run again: the disk is full"):
                work(place, "drawn", "w", QUICK)
        assert store.release("w") == 1
        assert work(place, "drawn", "v", QUICK) == 1 and store.counts() == {"done": 1}


def _lost(*given: Any) -> bool:
    raise StoreError("gone.")


def test_a_model_that_changed_since_it_was_queued_is_a_failure(place: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    sweep = drawn(bits=[2])
    (member,) = sweep.expand()
    object.__setattr__(member.spec, "contents", {"weights": "sha256:0"})
    with Store(place) as store:
        store.add("drawn", {}, [member])
        work(place, "drawn", "w", QUICK)
        ((reason, _),) = store.reasons("failed")
    assert reason.startswith("FileError: weights int2 group=16 is missing, or has changed")


def test_a_sweep_is_run_once_and_goes_on_where_it_was(place: str) -> None:
    said: list[str] = []
    first = run_sweep(drawn(), place, executor=_Here(), announce=said.append)
    again = run_sweep(drawn(bits=[2, 3, 4, 5]), place, executor=_Here(), announce=said.append)
    assert first.counts["done"] == 3 and again.counts["done"] == 4
    assert said[0].startswith("3 runs, 3 new") and said[1].startswith("4 runs, 1 new")
    with Store(place) as store:
        assert {row["attempt"] for row in store.runs()} == {1}


class _Here(Executor):
    """Runs in this process."""

    def run(self, store: Store, sweep: str | None, patience: Patience, tell: Callable[[], None] = lambda: None) -> None:
        work(store.place, sweep, "here", QUICK)


def test_a_killed_workers_run_is_run_by_another(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real processes: the first is killed with a run in hand, and the lease is an hour."""
    import nybble.lab.executors.local as local

    killed: list[str] = []
    start = local._started

    def started(where: str, sweep: str | None, name: str, patience: Patience) -> Any:
        if killed:
            return start(where, sweep, name, patience)
        killed.append(name)
        with Store(where) as store:
            assert store.claim(name, sweep, lease=3600.0) is not None
        process = start(where, sweep, name, patience)
        process.kill()
        return process

    monkeypatch.setattr(local, "_started", started)
    with filled(place) as store:
        Local(workers=1).run(store, "drawn", Patience())
        assert store.counts() == {"done": 3}
        rows = [*store.runs()]
        assert [row["attempt"] for row in rows] == [2, 1, 1] and killed[0] not in [row["worker"] for row in rows]


def test_workers_that_can_run_nothing_end_the_sweep(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import nybble.lab.executors.local as local

    start = local._started

    def started(*given: Any) -> Any:
        process = start(*given)
        process.kill()
        return process

    monkeypatch.setattr(local, "_started", started)
    with filled(place) as store, pytest.raises(StoreError, match=r"3 workers have ended \(status -9\) before"):
        Local(workers=1).run(store, "drawn", Patience())


def test_executors_are_named() -> None:
    assert REGISTRY.names() == ["local", "ray"]
