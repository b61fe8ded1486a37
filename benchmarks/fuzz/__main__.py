"""Damaged models of every layout that nybble reads: the model, or an error of nybble's own, and nothing else.

    PYTHONPATH=.:src python -m benchmarks.fuzz --count 100000 --out benchmarks/results/fuzz_readers.json

Each trial changes the files of a small model in one to three ways (benchmarks/fuzz/mutate.py), opens it and decodes
every packed tensor; one in four reads the whole model, one in sixteen builds and inspects it. Another error than nybble's, more than 2 s, 64 MiB or a file
elsewhere is a fault; it is named with what repeats it, and the run goes on. ``--only READER --trial N`` repeats one.
"""

from __future__ import annotations

import argparse
import platform
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.fuzz.folders import folders
from benchmarks.fuzz.judge import HANGS, FaultError, read, watched
from benchmarks.fuzz.mutate import Files, damaged
from nybble.core.files import atomic_write_json


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="readers whose name has this in it")
    parser.add_argument("--trial", type=int, help="this one alone")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    quiet()
    chosen = {name: make for name, make in folders().items() if options.only in name}
    each = -(-options.count // len(chosen))
    numbers = range(each) if options.trial is None else range(options.trial, options.trial + 1)
    readers: dict[str, Any] = {}
    all_faults: list[str] = []
    at = [""]
    with tempfile.TemporaryDirectory(dir=_memory()) as room:
        made = {}
        for name, make in chosen.items():
            place = Path(room, f"{len(made)}")
            place.mkdir()
            made[name] = files_of(make(place))
        there = Path(room, "it")
        there.mkdir()
        for name, whole in made.items():
            put(whole, there, {})
            assert read(there if len(whole) > 1 else there / next(iter(whole)), 2) == "read", name
            put({}, there, whole)
        with watched(at):
            for name, whole in made.items():
                began = time.monotonic()
                outcomes, kinds, faults = trials(name, whole, there, numbers, options.seed, at)
                all_faults += faults
                readers[name] = {"outcomes": dict(sorted(outcomes.items())), "damage": dict(sorted(kinds.items()))}
                rate = len(numbers) / (time.monotonic() - began)
                print(f"{name}: {dict(outcomes)}, {rate:.0f} a second", flush=True)
    total = sum(sum(found["outcomes"].values()) for found in readers.values())
    print(f"{total} trials, {len(all_faults)} faults")
    if options.out:
        record = {
            "command": f"python -m benchmarks.fuzz --count {options.count} --seed {options.seed}",
            "trials": total, "faults": all_faults, "seed": options.seed, "readers": readers, **versions(),
        }  # fmt: skip
        atomic_write_json(options.out, record)
    sys.exit(bool(all_faults))


def versions() -> dict[str, Any]:
    """What the trials ran on."""
    from importlib.metadata import version

    names = ("torch", "transformers", "safetensors", "compressed-tensors", "bitsandbytes", "gguf")
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
        "hardware": f"{platform.machine()}, one thread of a CPU",
    }


def quiet() -> None:
    """Other libraries have much to say about damaged files."""
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    torch.set_grad_enabled(False)


def _memory() -> str | None:
    """A file system in memory, where there is one."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


if __name__ == "__main__":
    main()
