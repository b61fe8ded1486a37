"""Damaged models of every layout that nybble reads: the model, or an error of nybble's own, and nothing else.

    PYTHONPATH=.:src python -m benchmarks.fuzz --count 111120 --out benchmarks/results/fuzz_readers.json

Each trial changes the files of a small model in one to three ways (benchmarks/fuzz/mutate.py), opens it and decodes
every packed tensor; one in four reads the whole model, one in sixteen builds and inspects it. Another error than
nybble's, more than 2 s, 64 MiB or a file elsewhere is a fault; it is named with what repeats it, and the run goes on.
``--only READER --trial N`` repeats one.
"""

from __future__ import annotations

import argparse
import json
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
    parser.add_argument("--resume", action="store_true", help="keep the readers that --out has already")
    parser.add_argument("--only", default="", help="readers whose name has this in it")
    parser.add_argument("--trial", type=int, help="this one alone")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    chosen = [name for name in folders() if options.only in name]
    each = -(-options.count // len(chosen))
    numbers = range(each) if options.trial is None else range(options.trial, options.trial + 1)
    record: dict[str, Any] = {
        "command": f"python -m benchmarks.fuzz --count {options.count} --seed {options.seed}",
        "seed": options.seed, "each": len(numbers), "trials": 0, "faults": [], "readers": {}, **versions(),
    }  # fmt: skip
    if options.resume and options.out and options.out.exists():
        before = json.loads(options.out.read_text())
        record = before if (before["seed"], before["each"]) == (options.seed, len(numbers)) else record
    left = [name for name in chosen if name not in record["readers"]]
    with get_context("spawn").Pool(options.processes) as pool:
        for name, found, faults in pool.imap_unordered(partial(of_reader, numbers=numbers, seed=options.seed), left):
            record["readers"][name] = found
            record["faults"] += faults
            record["trials"] += len(numbers)
            print(f"{name}: {found['outcomes']}", flush=True)
            if options.out:
                record["readers"] = {n: record["readers"][n] for n in chosen if n in record["readers"]}
                atomic_write_json(options.out, record)
    all_faults = record["faults"]
    print(f"{record['trials']} trials, {len(all_faults)} faults")
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
