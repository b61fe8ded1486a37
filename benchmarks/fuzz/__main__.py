"""Damaged models of every layout that nybble reads: the model, or an error of nybble's own, and nothing else.

    PYTHONPATH=.:src python -m benchmarks.fuzz --count 100000 --out benchmarks/results/fuzz_readers.json

Each trial changes the files of a small model in one to three ways (benchmarks/fuzz/mutate.py), opens it and decodes
every packed tensor; one in four reads the whole model, one in sixteen builds and inspects it. Another error than
nybble's, more than 2 s, 64 MiB or a file elsewhere is a fault; it is named with what repeats it, and the run goes on.
``--only READER --trial N`` repeats one.
"""

from __future__ import annotations

import argparse
import platform
import sys
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.fuzz.folders import folders
from benchmarks.fuzz.run import of_reader

from nybble.core.files import atomic_write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="readers whose name has this in it")
    parser.add_argument("--trial", type=int, help="this one alone")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    chosen = [name for name in folders() if options.only in name]
    each = -(-options.count // len(chosen))
    numbers = range(each) if options.trial is None else range(options.trial, options.trial + 1)
    readers: dict[str, Any] = {}
    all_faults: list[str] = []
    with get_context("spawn").Pool(options.processes) as pool:
        for name, found, faults in pool.imap(partial(of_reader, numbers=numbers, seed=options.seed), chosen):
            readers[name] = found
            all_faults += faults
            print(f"{name}: {found['outcomes']}", flush=True)
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
        "hardware": f"{platform.machine()}, one thread of a CPU a reader",
    }


if __name__ == "__main__":
    main()
