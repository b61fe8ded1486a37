"""The trials of one reader, in a process that may be one of several."""

from __future__ import annotations

import logging
import random
import signal
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from benchmarks.fuzz.folders import folders
from benchmarks.fuzz.judge import HANGS, FaultError, read, watched
from benchmarks.fuzz.mutate import Files, damaged


def files_of(path: Path) -> Files:
    """Name -> bytes."""
    found = [path] if path.is_file() else [p for p in path.iterdir() if p.is_file() and p.suffix != ".md"]
    return {p.name: p.read_bytes() for p in sorted(found)}


def put(files: Files, place: Path, before: Files) -> None:
    """Have these files in ``place``, and no others; ``before`` are those that are there."""
    for name in before.keys() - files.keys():
        (place / name).unlink()
    for name, data in files.items():
        if before.get(name) is not data:
            (place / name).write_bytes(data)


def trials(
    reader: str, whole: Files, place: Path, numbers: range, seed: int, at: list[str]
) -> tuple[Counter[str], Counter[str], list[str]]:
    """Outcomes and kinds of damage by count, and the faults."""
    target = place if len(whole) > 1 else place / next(iter(whole))
    outcomes, kinds, faults = Counter[str](), Counter[str](), []
    there: Files = {}
    for number in numbers:
        r = random.Random(f"{reader} {seed} {number}")
        what, files = damaged(whole, r)
        put(files, place, there)
        there = files
        at[0] = f"{reader}, trial {number} ({what})"
        signal.alarm(HANGS)
        try:
            outcomes[read(target, (number % 4 == 0) + (number % 16 == 0))] += 1
        except FaultError as fault:
            outcomes["fault"] += 1
            faults.append(f"{at[0]}: {fault}")
            print(faults[-1], file=sys.stderr, flush=True)
        kinds[what] += 1
    signal.alarm(0)
    put({}, place, there)
    return outcomes, kinds, faults


def of_reader(name: str, numbers: range, seed: int) -> tuple[str, dict[str, Any], list[str]]:
    """The trials of one reader: its name, outcomes and kinds of damage by count, and the faults."""
    quiet()
    with tempfile.TemporaryDirectory(dir=_memory()) as room:
        place, there = Path(room, "made"), Path(room, "it")
        place.mkdir()
        there.mkdir()
        whole = files_of(folders()[name](place))
        put(whole, there, {})
        assert read(there if len(whole) > 1 else there / next(iter(whole)), 2) == "read", name
        put({}, there, whole)
        at = [""]
        with watched(at):
            outcomes, kinds, faults = trials(name, whole, there, numbers, seed, at)
    return name, {"outcomes": dict(sorted(outcomes.items())), "damage": dict(sorted(kinds.items()))}, faults


def quiet() -> None:
    """Other libraries have much to say about damaged files."""
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(logging.CRITICAL)
    torch.set_grad_enabled(False)


def _memory() -> str | None:
    """A file system in memory, where there is one."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None
