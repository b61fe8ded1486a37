"""Multiply-adds per clock of exported training steps: types, kernels, one core and all.

    python benchmarks/c_train.py --out benchmarks/results/c_train.json

ResNet8 on 28 x 28 pixels and DS-CNN on 49 x 10, one sample a step: forward, both gradients, SGD. Multiply-adds are
those of matrix products; time is of the whole step. Clocks are the core's own where the kernel lets the program count
them (perf_event_open), else those of the time stamp counter, which ticks at a fixed rate: the result says which. Every
program is checked against the emulation's tensors, bit for bit, before it is timed. Builds take turns, and of each the
best turn counts; ``noise`` is how far its median turn is above that.

Half precision is the processor's own with AVX512-FP16 alone (``avx512_fp16`` in the result); elsewhere each operation
goes through float32, as gcc (2 lanes) or eight numbers at a time (8 lanes), and bfloat16 always does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from nybble.core.files import atomic_file
from nybble.core.versions import VERSION
from nybble.microcontroller.compiler import built, make, version
from nybble.microcontroller.networks import ds_cnn, resnet8
from nybble.microcontroller.project import write_project
from nybble.microcontroller.settings import Settings
from nybble.microcontroller.trace import stack_of

NETWORKS = {"resnet8": (resnet8, (1, 28, 28)), "ds-cnn": (ds_cnn, (1, 49, 10))}
VECTORS = {"float32": (4, 8), "float16": (2, 8), "bfloat16": (2,)}
"""Lanes beside the scalar kernels: two of 16 bits are a microcontroller's, the others this processor's."""


def builds(lanes: tuple[int, ...], cores: int) -> list[dict[str, int]]:
    """Variables of make, of each build."""
    kinds = [{"LANES": 1, "UNROLL": 1}, {"LANES": 1, "UNROLL": 4}]
    kinds += [{"LANES": width, "UNROLL": unroll} for width in lanes for unroll in (1, 4)]
    return [kind | {"CORES": count} for kind in kinds for count in sorted({1, cores})]


def prepared(network: str, type_: str, cores: int, work: Path) -> list[tuple[dict[str, Any], Path]]:
    """Programs of a network in a type, each checked."""
    build, shape = NETWORKS[network]
    torch.manual_seed(0)
    stack = stack_of(build(shape[0], 10), shape)
    found = []
    for lanes in VECTORS[type_]:
        folder = work / f"{network}-{type_}-{lanes}"
        folder.mkdir()
        write_project(stack, folder, Settings(type=type_, lanes=lanes))
        for variables in builds((lanes,), cores):
            if variables["LANES"] == 1 and lanes != VECTORS[type_][0]:
                continue
            make(folder, "check", **variables)
            found.append(({"network": network, "type": type_, **variables}, built(folder, "train", variables)))
            print(found[-1][0], "equal to the emulation", flush=True)
    return found


def timed(program: Path, seconds: float) -> dict[str, Any]:
    said = subprocess.run([program, "time", str(seconds)], capture_output=True, text=True, check=True).stdout
    found: dict[str, Any] = json.loads(said)
    return found


def row(about: dict[str, Any], turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one build's turns."""
    best = min(turns, key=lambda turn: turn["seconds"])
    middle = statistics.median(turn["seconds"] for turn in turns)
    names = {"LANES": "lanes", "UNROLL": "unroll", "CORES": "cores"}
    return {
        **{names.get(key, key): value for key, value in about.items()},
        "multiply_adds": best["mac"],
        "milliseconds": round(1e3 * best["seconds"], 4),
        "clocks": round(best["clocks"]),
        "mac_per_clock": round(best["mac_per_clock"], 4),
        "clock": best["clock"],
        "noise": round(middle / best["seconds"] - 1, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--networks", nargs="+", default=[*NETWORKS], choices=[*NETWORKS])
    parser.add_argument("--types", nargs="+", default=["float32", "float16"], choices=[*VECTORS])
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1, help="beside one (default: all)")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="of a turn (default 0.5)")
    options = parser.parse_args()
    load = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory(prefix="nybble-") as work:
        programs = [
            found
            for network in options.networks
            for type_ in options.types
            for found in prepared(network, type_, options.cores, Path(work))
        ]
        taken: list[list[dict[str, Any]]] = [[] for _ in programs]
        for _ in range(options.turns):
            for place, (_, program) in enumerate(programs):
                taken[place].append(timed(program, options.seconds))
            load.append(os.getloadavg()[0])
    rows = [row(about, turns) for (about, _), turns in zip(programs, taken, strict=True)]
    for one in rows:
        print(one, flush=True)
    report = {
        "what": (__doc__ or "").partition("\n")[0], "nybble": VERSION, "gcc": version(), "flags": "-O3 -march=native",
        "cores": os.cpu_count(), "processor": processor(), "avx512_fp16": "avx512_fp16" in flags(),
        "load_average": {"least": round(min(load), 2), "most": round(max(load), 2)},
        "python": platform.python_version(), "torch": torch.__version__, "results": rows,
    }  # fmt: skip
    if options.out is not None:
        with atomic_file(options.out) as file:
            file.write((json.dumps(report, indent=1) + "\n").encode())


def _cpuinfo(name: str) -> str:
    place = Path("/proc/cpuinfo")
    lines = place.read_text(encoding="utf-8").splitlines() if place.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def processor() -> str:
    return _cpuinfo("model name") or platform.machine()


def flags() -> list[str]:
    return _cpuinfo("flags").split()


if __name__ == "__main__":
    main()
