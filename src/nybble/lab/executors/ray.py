"""``ray``: workers on a Ray cluster; of several machines the store is a PostgreSQL database."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nybble.core.errors import NybbleError, StoreError, UsageError
from nybble.lab.database import is_file
from nybble.lab.executors import BARREN, Executor
from nybble.lab.store import Store
from nybble.lab.worker import Patience, new_worker, work


@dataclass(frozen=True, kw_only=True)
class OnRay(Executor):
    """A Ray task a worker.

    Attributes:
        workers: how many at a time. cpus, gpus: that each asks for.
        address: of a cluster; empty: that of ``RAY_ADDRESS``, or a cluster of this machine, started for the sweep.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    address: str = ""

    def run(self, store: Store, sweep: str | None, patience: Patience, tell: Callable[[], None] = lambda: None) -> None:
        """As :meth:`Executor.run`; the runs of a node that dies are taken over at once."""
        try:
            import ray
        except ImportError as error:
            raise UsageError("this executor needs Ray: pip install 'nybble[lab]'") from error
        begun = not ray.is_initialized()
        if begun:
            ray.init(address=self.address or None, log_to_driver=False, include_dashboard=False)
        try:
            _check_reach(store, ray)
            # A worker that dies is replaced here, where its claims are let go: Ray is not to try it again by itself.
            task: Any = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=0)(_main)
            self._drive(ray, task, store, sweep, patience, tell)
        finally:
            if begun:
                ray.shutdown()

    def _drive(
        self, ray: Any, task: Any, store: Store, sweep: str | None, patience: Patience, tell: Callable[[], None]
    ) -> None:
        held: dict[Any, str] = {}
        barren = 0
        try:
            while (left := store.unfinished(sweep)) or held:
                while len(held) < min(self.workers, left):
                    name = new_worker()
                    held[task.remote(store.place, sweep, name, patience)] = name
                over, _ = ray.wait([*held], num_returns=1, timeout=0.2)
                for reference in over:
                    name = held.pop(reference)
                    said, died = _said(ray, reference)
                    released = store.release(name)
                    if said:
                        raise StoreError(said)
                    barren = 0 if not died or released else barren + 1
                    if barren >= BARREN:
                        raise StoreError(f"{barren} workers have ended before they could run anything: {died}")
                tell()
        finally:
            for reference, name in held.items():
                ray.cancel(reference, force=True)
                store.release(name)


def _main(place: str, sweep: str | None, name: str, patience: Patience) -> str:
    """A worker's task: why it ends early, or nothing."""
    try:
        work(place, sweep, name, patience)
    except NybbleError as error:
        return f"worker {name}: {error}"
    return ""


def _said(ray: Any, reference: Any) -> tuple[str, str]:
    """Why a worker ended, as it says itself; and of what it died without a word."""
    try:
        return ray.get(reference), ""
    except ray.exceptions.RayError as error:
        return "", str(error).strip().splitlines()[0]


def _check_reach(store: Store, ray: Any) -> None:
    """Refuse a file where workers would run on machines that don't have it."""
    machines = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if is_file(store.place) and len(machines) > 1:
        raise UsageError(
            f"{store.place} is a file of this machine, and the cluster has {len(machines)} machines; "
            "give a PostgreSQL database, --store postgresql://..."
        )


PART = OnRay
