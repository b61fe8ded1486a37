"""``local``: processes of this machine."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import FrameType

from nybble.core.errors import NybbleError, StoreError
from nybble.lab.executors import BARREN, Executor
from nybble.lab.store import Store
from nybble.lab.worker import Patience, new_worker, parent_is_gone, work

_REFUSED = 3
"""Exit status of a worker that said why it ends."""
_GRACE = 10
"""Seconds that a worker gets to put back what it was running."""


@dataclass(frozen=True, kw_only=True)
class Local(Executor):
    """A process a worker; ``workers``: how many at a time."""

    def run(self, store: Store, sweep: str | None, patience: Patience, tell: Callable[[], None] = lambda: None) -> None:
        """As :meth:`Executor.run`; a worker that is killed is replaced, and its run is taken over at once."""
        held: dict[str, BaseProcess] = {}
        barren = 0
        try:
            while (left := store.unfinished(sweep)) or held:
                while len(held) < min(self.workers, left):
                    name = new_worker()
                    held[name] = _started(store.place, sweep, name, patience)
                wait([process.sentinel for process in held.values()], timeout=0.2)
                for name in [name for name, process in held.items() if process.exitcode is not None]:
                    code = held.pop(name).exitcode
                    released = store.release(name)
                    if code == _REFUSED:
                        raise StoreError(f"{store.place}: a worker has ended; it said why above.")
                    barren = 0 if not code or released else barren + 1
                    if barren >= BARREN:
                        raise StoreError(f"{barren} workers have ended (status {code}) before they could run anything.")
                tell()
        finally:
            _end(held, store)


def _started(place: str, sweep: str | None, name: str, patience: Patience) -> BaseProcess:
    # spawned: a fork of a process with threads, or with a GPU in use, may hang
    process = multiprocessing.get_context("spawn").Process(target=_main, args=(place, sweep, name, patience))
    process.start()
    return process


def _main(place: str, sweep: str | None, name: str, patience: Patience) -> None:
    """A worker's process."""
    signal.signal(signal.SIGTERM, _leave)
    try:
        work(place, sweep, name, patience, stop=parent_is_gone)
    except NybbleError as error:
        print(f"nybble: worker {name}: {error}", file=sys.stderr, flush=True)
        sys.exit(_REFUSED)
    except KeyboardInterrupt:
        sys.exit(1)


def _leave(number: int, frame: FrameType | None) -> None:
    """Puts back what is being run, and removes its folder, on the way out."""
    sys.exit(1)


def _end(held: dict[str, BaseProcess], store: Store) -> None:
    """Stop workers that still run, and let go of what they hold."""
    for process in held.values():
        process.terminate()
    for name, process in held.items():
        process.join(_GRACE)
        process.kill()  # stuck in compiled code
        process.join()
        store.release(name)


PART = Local
