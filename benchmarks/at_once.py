"""Rows of a study, each a process of its own, several on a GPU: those that are done stay done.

A script calls :func:`run` with the names of its rows and gets a file a row; called again, it goes on with the others.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def file_of(work: Path, row: str) -> Path:
    """Where a row's result is."""
    return work / "rows" / f"{re.sub('[^a-z0-9]+', '-', row.lower())}.json"


def run(script: str, rows: Sequence[str], work: Path, *, workers: int, ends: float, device: str) -> dict[str, Any]:
    """Run what isn't there yet, ``workers`` at a time.

    Args:
        script: file; it is called with this call's arguments, and ``--row NAME``.
        rows: names.
        work: folder of its files, and of what each printed.
        workers: rows at a time.
        ends: by ``time.monotonic``; what runs then is ended.
        device: cuda: rows are spread over the GPUs that there are.

    Returns:
        name -> result, of those that are done.
    """
    (work / "rows").mkdir(parents=True, exist_ok=True)
    gpus = torch.cuda.device_count() if device == "cuda" else 1
    waiting = [row for row in rows if not file_of(work, row).exists()]
    running: dict[str, tuple[int, subprocess.Popen[bytes]]] = {}
    while (waiting or running) and time.monotonic() < ends:
        while waiting and len(running) < workers:
            busy = [gpu for gpu, _ in running.values()]
            gpu = min(range(gpus), key=busy.count)
            row = waiting.pop(0)
            running[row] = gpu, _start(script, row, work, gpu if device == "cuda" else None)
        time.sleep(0.2)
        for row in [row for row, (_, process) in running.items() if process.poll() is not None]:
            _, process = running.pop(row)
            print(f"{row}: {'done' if process.returncode == 0 else f'failed ({process.returncode})'}", flush=True)
    for row, (_, process) in running.items():
        process.terminate()
        process.wait()
        print(f"{row}: ended before it was done", flush=True)
    found = {row: file_of(work, row) for row in rows}
    return {row: json.loads(file.read_text()) for row, file in found.items() if file.exists()}


def _start(script: str, row: str, work: Path, gpu: int | None) -> subprocess.Popen[bytes]:
    more = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": _named(gpu)}
    with file_of(work, row).with_suffix(".txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, script, *sys.argv[1:], "--row", row], stdout=log, stderr=subprocess.STDOUT,
            env={**os.environ, **more, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def _named(gpu: int) -> str:
    """As the environment that we were started in calls it."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return str(gpu) if not given else given.split(",")[gpu]
