"""How fast a packed model runs: SmolLM2 in several formats beside its float self, on this machine's CPU.

    python benchmarks/speed.py --out benchmarks/results/speed.json        (five minutes on two cores)

Two things are timed: reading 256 tokens at once, and writing four more with a cache behind 32. The models take turns,
and each ratio is the median over the turns of its time over that of the float model (bfloat16) in the same turn. A
packed layer multiplies with its codes where a kernel does; ``dense=True`` at load keeps an unpacked copy beside the
packed one: the same numbers, in more memory than the float model's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from memory import processor
from torch import nn

import nybble
from nybble.core.files import atomic_write_json
from nybble.core.versions import versions
from nybble.nn.swap import hold_dense
from nybble.pipelines.bench import read, write

MODEL = "demo:smollm2"
ROWS: dict[str, dict[str, Any]] = {
    "int8 channel": {"weights": "int8 channel"},
    "int4 group=64": {"weights": "int4 group=64"},
    "nvfp4": {"weights": "nvfp4"},
    "FP8_DYNAMIC": {"scheme": "FP8_DYNAMIC"},
    "NVFP4": {"scheme": "NVFP4"},
}
READ, WRITTEN = 256, 4


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each model (default 3)")
    options = parser.parse_args()
    reference = nybble.load(MODEL)[0].eval()
    models: dict[str, nn.Module] = {"float": reference}
    for name, request in ROWS.items():
        models[name] = nybble.quantize(MODEL, "rtn", **request)[0]
    models["int4 group=64, dense"] = nybble.quantize(MODEL, "rtn", weights="int4 group=64")[0]
    hold_dense(models["int4 group=64, dense"], torch.bfloat16)
    for model in models.values():  # the first call of each makes buffers and code
        read(model, READ)
        write(model, 1, WRITTEN)
    turns = [
        {name: (read(model, READ), write(model, 1, WRITTEN)) for name, model in models.items()}
        for _ in range(options.rounds)
    ]
    rows = []
    for name, model in models.items():
        over = [statistics.median(turn[name][i] / turn["float"][i] for turn in turns) for i in (0, 1)]
        took = [statistics.median(turn[name][i] for turn in turns) for i in (0, 1)]
        rows.append({
            "name": name,
            "bytes": held(model),
            "read": round(over[0], 2),
            "write": round(over[1], 2),
            "tokens_per_second": [round(READ / took[0]), round(WRITTEN / took[1], 1)],
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    if options.out is not None:
        machine = {"cpu": processor(), "threads": torch.get_num_threads(), "cores": os.cpu_count()}
        result = {"model": MODEL, "read": READ, "written": WRITTEN, "rounds": options.rounds, "machine": machine}
        atomic_write_json(options.out, {**result, "versions": versions(), "rows": rows})


def held(model: nn.Module) -> int:
    """Bytes of parameters and buffers, each once; the copies of ``hold_dense`` too."""
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        tensors |= {t.data_ptr(): t.nbytes for t in vars(module).values() if isinstance(t, torch.Tensor)}
    return sum(tensors.values())


if __name__ == "__main__":
    main()
