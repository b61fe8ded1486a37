"""Seconds and peak memory of the main recipes, this version of nybble against an earlier one, run in turn.

    python benchmarks/before_after.py --before COMMIT [--device cuda] [--rounds 3] [--record FILE]

Each run is a process of its own: SmolLM2, quantized in memory from ``builtin``. The order is ABBA, so that a machine
that gets slower or faster favours neither.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ROWS: dict[str, dict[str, Any]] = {
    "gptq int4 g64": {"recipe": "gptq", "weights": "int4 group=64 scale_format=float16"},
    "llm-fp4 W4A4, quick": {"recipe": "llm-fp4", "effort": "quick"},
}


def main() -> None:
    """Run, compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", help="a commit; or the src folder of an earlier version", required=False)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2, help="pairs of runs of each row")
    parser.add_argument("--record", help="a JSON file to write")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.model, arguments.device, arguments.samples)
        return
    if Path(arguments.before).is_dir():
        rows = compare(Path(arguments.before), arguments)
    else:
        with tempfile.TemporaryDirectory() as folder:
            tree = Path(folder) / "before"
            add = ["git", "worktree", "add", "--detach", str(tree), arguments.before]
            subprocess.run(add, cwd=ROOT, check=True, capture_output=True)
            try:
                rows = compare(tree / "src", arguments)
            finally:
                subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
    for row in rows:
        print(f"{row['row']}: time {row['time_ratio']:.3f}, peak memory {row['memory_ratio']:.3f} of before's")
    if arguments.record:
        Path(arguments.record).write_text(json.dumps({**where(arguments), "rows": rows}, indent=1) + "\n")


def where(arguments: Any) -> dict[str, Any]:
    """The machine and what was run."""
    import torch

    gpu = torch.cuda.get_device_name() if arguments.device != "cpu" else ""
    return {
        "before": arguments.before if not Path(arguments.before).is_dir() else "an earlier version's src",
        "device": gpu or f"{platform.machine()}, {os.cpu_count()} cores", "samples": arguments.samples, "seq_len": 512,
        "torch": torch.__version__, "rounds": arguments.rounds,
    }  # fmt: skip


def compare(before: Path, arguments: Any) -> list[dict[str, Any]]:
    """All rows; ratios are of medians."""
    found = []
    for row in ROWS:
        runs: dict[str, list[dict[str, float]]] = {"before": [], "after": []}
        for pair in range(arguments.rounds):
            order = [("before", before), ("after", ROOT / "src")]
            for side, source in order if pair % 2 == 0 else reversed(order):
                runs[side].append(run(source, row, arguments))
                print(row, side, runs[side][-1], file=sys.stderr, flush=True)
        middle = {s: {k: statistics.median(r[k] for r in each) for k in each[0]} for s, each in runs.items()}
        ratios = {k: middle["after"][k] / middle["before"][k] for k in ("seconds", "memory")}
        found.append({"row": row, "time_ratio": ratios["seconds"], "memory_ratio": ratios["memory"], "runs": runs})
    return found


def run(source: Path, row: str, arguments: Any) -> dict[str, float]:
    """One run in a process of its own."""
    command = [
        sys.executable, str(Path(__file__).resolve()), "--child", row, "--model", arguments.model,
        "--device", arguments.device, "--samples", str(arguments.samples),
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(source)}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


def child(row: str, model: str, device: str, samples: int) -> None:
    """Quantize once; print seconds and the peak of memory (of the device's, on a GPU)."""
    import torch

    import nybble
    from nybble.pipelines.request import build_recipe

    settings = nybble.Settings(samples=samples, seq_len=512, device=device)
    started = time.perf_counter()
    options = dict(ROWS[row])
    recipe = build_recipe(options.pop("recipe"), **options)
    nybble.quantize(model, recipe, "builtin", settings=settings)
    if device != "cpu":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "memory": torch.cuda.max_memory_allocated() if device != "cpu" else memory}))


if __name__ == "__main__":
    main()
