"""Worker processes that train: each keeps the data and the network of its task for its next run."""

from __future__ import annotations

import os
import time
import traceback
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from benchmarks.optimizer_quality.record import Record, Run, expected
from benchmarks.optimizer_quality.train import Trainer


@dataclass(frozen=True, kw_only=True)
class Place:
    """What a worker trains with; see :class:`~benchmarks.optimizer_quality.train.Trainer`."""

    data: Path
    device: str
    mode: str
    changes: dict[str, Any]
    tiny: bool


class Worker:
    """A process with a pipe; ``run`` is what it is doing, ``last`` the task it has loaded."""

    def __init__(self, place: Place) -> None:
        context = get_context("spawn")
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=serve, args=(there, place), daemon=True)
        self.process.start()
        there.close()
        self.run: Run | None = None
        self.last: str | None = None

    def begin(self, run: Run) -> None:
        """Send a run."""
        self.run, self.last = run, run[1]
        self.pipe.send(run)

    def found(self) -> dict[str, Any] | str:
        """The record of its run, or what went wrong."""
        self.run = None
        try:
            found: dict[str, Any] | str = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(timeout=5)
            return f"its process ended ({self.process.exitcode})"
        return found


def work(runs: list[Run], places: list[Place], seconds: float, record: Record) -> tuple[list[Run], list[Run]]:
    """Give runs to one worker for each place; return those that weren't begun in time, and those that failed."""
    began, waiting, failed = time.monotonic(), list(runs), list[Run]()
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, (os.cpu_count() or 1) // len(places))))
    workers = [Worker(place) for place in places[: len(runs)]] if seconds > 0 else []
    try:
        while workers:
            for worker in [worker for worker in workers if worker.run is None]:
                if not waiting or time.monotonic() - began > seconds or not worker.process.is_alive():
                    workers.remove(worker)
                    worker.pipe.close()
                    continue
                run = pick(waiting, worker.last, [other.run for other in workers if other.run], record)
                waiting.remove(run)
                worker.begin(run)
            pipes = {worker.pipe: worker for worker in workers}
            for pipe in wait(list(pipes), timeout=1) if pipes else ():
                worker = pipes[pipe]  # type: ignore[index]
                done, found = worker.run, worker.found()
                assert done is not None
                if isinstance(found, str):
                    failed.append(done)
                    print(f"{named(done)} FAILED: {found}", flush=True)
                else:
                    record.add(found)
                    print(f"{time.monotonic() - began:6.0f} s  {named(done)}: {said(found)}", flush=True)
    finally:
        for worker in workers:
            worker.process.terminate()
    return waiting, failed


def named(run: Run) -> str:
    """For people."""
    seed, task, optimizer = run
    return f"{task} {optimizer} {seed}"


def said(found: dict[str, Any]) -> str:
    """The line of a run."""
    judged = ", ".join(f"{name} {value:.4f}" for name, value in found["held_out"].items())
    return f"{judged}; {found['seconds']:.0f} s, {found['ms_a_step']:.1f} ms a step, {found['mode']}"


def pick(waiting: list[Run], last: str | None, doing: list[Run], record: Record) -> Run:
    """The next run: of the first seed, of the task that the worker has loaded, or that most is left of.

    Of each task the 32-bit ones come first, as they stand among the choices.
    """
    now = [run for run in waiting if run[0] == waiting[0][0]]
    left = {task: sum(expected(run, record) for run in now if run[1] == task) for task in {run[1] for run in now}}
    most = max(left, key=lambda task: (task == last, left[task] / (1 + sum(run[1] == task for run in doing)), task))
    return next(run for run in now if run[1] == most)


def serve(pipe: Any, place: Place) -> None:
    """A worker: runs come in, records go out, or what went wrong."""
    if place.device.startswith("cuda"):
        torch.cuda.set_device(place.device)
        torch.set_num_threads(2)
    torch.set_float32_matmul_precision("high")
    trainer = Trainer(place.data, place.device, place.mode, place.changes, place.tiny)
    while True:
        try:
            seed, task, name = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(trainer.run(task, name, seed))
        except Exception as error:
            traceback.print_exc()
            pipe.send(f"{type(error).__name__}: {str(error)[:500]}")
