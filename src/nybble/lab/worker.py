"""A worker: claims a run, runs it while a thread keeps the lease, and brings what came out; until none is left."""

from __future__ import annotations

import multiprocessing
import os
import platform
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from nybble.core.errors import FileError, NybbleError, StoreError, UsageError
from nybble.lab.claim import LEASE, Claim, Outcome
from nybble.lab.outbox import keep
from nybble.lab.store import Store

_TRACE = 4000
"""Letters of a traceback that are kept."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Times, in seconds.

    Attributes:
        lease: for which a claim holds; it is renewed four times in it. poll: between two looks for work where others
            still have some. store: for which a worker tries to bring a result to a store that can't be reached.
    """

    lease: float = LEASE
    poll: float = 1.0
    store: float = 600.0


def new_worker() -> str:
    """A worker's name, which no other one has."""
    return f"{socket.gethostname()}:{os.getpid()}:{uuid4().hex[:8]}"


def work(
    place: str, sweep: str | None, worker: str, patience: Patience | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> int:  # fmt: skip
    """Run what there is to run, until nothing is queued and nobody else's run can come back.

    Args:
        place: of the store.
        sweep: whose runs; None: all.
        worker: its name.
        patience: times.
        stop: asked between runs.

    Returns:
        How many runs this worker finished.

    Raises:
        StoreError: the store can't be reached for longer than ``patience.store``; the result that was to be brought is
            kept in a file (:mod:`nybble.lab.outbox`).
    """
    times, count = patience or Patience(), 0
    environment = _environment()
    with Store(place, create=False) as store, _Heart(store, times) as heart:
        while not stop():
            claim = _patiently(lambda: store.claim(worker, sweep, times.lease), times.store)
            if claim is None:
                if not _patiently(lambda: store.unfinished(sweep), times.store):
                    break
                time.sleep(times.poll)
                continue
            try:
                with heart.holding(claim):
                    outcome = run_claimed(claim, environment)
            except BaseException:  # Ctrl-C, or a worker that is told to end
                with suppress(NybbleError):
                    store.put_back(claim)
                raise
            count += _bring(store, claim, outcome, times)
    return count


def run_claimed(claim: Claim, environment: dict[str, Any]) -> Outcome:
    """Run it; what fails is an outcome, too."""
    started = time.perf_counter()
    try:
        claim.spec.check_contents()
        made = claim.spec.make()
        with tempfile.TemporaryDirectory(prefix="nybble-lab-") as folder:
            result = dict(made.run(Path(folder)))
    except UsageError as error:
        return _over("illegal", started, environment, error=str(error))
    except NybbleError as error:
        return _over("failed", started, environment, error=f"{type(error).__name__}: {error}")
    except Exception as error:
        lines = traceback.format_exc()[-_TRACE:]
        return _over("failed", started, environment, error=f"{type(error).__name__}: {error}\n{lines}")
    return _over("done", started, environment, result=result)


def _over(state: Any, started: float, environment: dict[str, Any], **found: Any) -> Outcome:
    return Outcome(state=state, seconds=time.perf_counter() - started, environment=environment, **found)


def _environment() -> dict[str, Any]:
    """What may change a number or a time, once a worker; a GPU is named when a run has started it."""
    from nybble.core.versions import versions

    return {**versions(), "machine": platform.machine(), "cores": os.cpu_count(), "gpu": _gpu()}


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _patiently(ask: Callable[[], Any], seconds: float) -> Any:
    """Ask a store again and again while it can't be reached; the first refusal is told on standard error."""
    until, wait, told = time.monotonic() + seconds, 0.1, False
    while True:
        try:
            return ask()
        except StoreError as error:
            if time.monotonic() >= until:
                raise
            if not told:
                print(f"nybble lab: {error} Trying for {seconds:.0f} seconds; nothing is lost.", file=sys.stderr)
            told = True
        time.sleep(min(wait, max(0.0, until - time.monotonic())))
        wait = min(2 * wait, 30.0)


def _bring(store: Store, claim: Claim, outcome: Outcome, times: Patience) -> bool:
    """Give a store what became of a run, or keep it in a file; whether it was taken."""
    try:
        return bool(_patiently(lambda: store.finish(claim, outcome), times.store))
    except StoreError as error:
        try:
            path = keep(store.place, claim.key, outcome)
        except FileError as also:
            raise StoreError(f"{error} The run that was just finished has to run again: {also}") from error
        raise StoreError(f"{error} What was just finished is kept in {path}; the next sweep brings it.") from error


class _Heart:
    """Renews the claim that is held, from a thread of its own."""

    def __init__(self, store: Store, times: Patience) -> None:
        self._store, self._times = store, times
        self._claim: Claim | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> _Heart:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    @contextmanager
    def holding(self, claim: Claim) -> Iterator[None]:
        """Renew a claim while the block runs."""
        self._claim = claim
        try:
            yield
        finally:
            self._claim = None

    def _beat(self) -> None:
        while not self._ended.wait(self._times.lease / 4):
            claim = self._claim
            if claim is not None:
                with suppress(StoreError):  # it may be back at the next beat
                    self._store.renew(claim, self._times.lease)


def parent_is_gone() -> bool:
    """Whether the process that started this one has ended: nobody would tell this one to end then."""
    parent = multiprocessing.parent_process()
    return parent is not None and not parent.is_alive()
