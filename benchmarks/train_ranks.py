"""``nybble train`` by one process and by several, each on a GPU of its own: the same bytes, and seconds of an update.

    python benchmarks/train_ranks.py --device cuda --ranks 2 --out benchmarks/results/train_ranks.json

Every case trains the model for --steps updates of --accumulate forwards, on a text file's rows or on texts of its own;
then again by torchrun. Files are compared by their SHA-256 (logs and times.json say seconds). Seconds are of the whole
command, loading included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from nybble.core.files import atomic_write_json, sha256_file
from nybble.core.versions import versions

sys.path.insert(0, str(Path(__file__).parent / "quality"))

from run import hardware

CASES: dict[str, list[str]] = {
    "qat": ["qat", "--weights", "int4 group=64", "--activations", "int8 token"],
    "llm-qat": ["llm-qat", "--data", "self:256"],
    "distill": ["distill", "--weights", "int3 group=64"],
    "qlora": ["qlora", "--set", "dropout=0.1"],
}


def run(case: str, out: Path, options: argparse.Namespace, count: int) -> float:
    """One command; its seconds."""
    words = CASES[case]
    data = [] if "--data" in words else ["--data", options.data]
    loop = {
        "steps": options.steps, "batch": options.batch, "accumulate": options.accumulate, "seq-len": options.seq_len,
        "device": options.device,
    }  # fmt: skip
    given = [word for name, value in loop.items() for word in (f"--{name}", str(value))]
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(count)] if count > 1 else []
    command = [
        sys.executable,
        *start,
        "-m",
        "nybble",
        "train",
        words[0],
        options.model,
        str(out),
        *words[1:],
        *data,
        *given,
    ]
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def sums(out: Path) -> dict[str, str]:
    """Of all files but those that say seconds."""
    found = (p for p in sorted(out.rglob("*")) if p.is_file() and p.name != "times.json" and "logs" not in p.parts)
    return {str(p.relative_to(out)): sha256_file(p) for p in found}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M")
    parser.add_argument("--data", default="builtin")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--cases", nargs="+", default=[*CASES], choices=[*CASES])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "train_ranks.json")
    for name, default in (("steps", 10), ("batch", 2), ("accumulate", 4), ("seq-len", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    rows, here, options.out = dict[str, Any](), Path.cwd(), options.out.resolve()
    for case in options.cases:
        seconds, found = dict[str, float](), []
        for count in (1, options.ranks):
            with tempfile.TemporaryDirectory() as folder:
                os.chdir(folder)  # what is written names its place
                seconds[str(count)] = round(run(case, Path("out"), options, count), 2)
                found.append(sums(Path("out")))
                os.chdir(here)
        one, more = found
        other = sorted(name for name in {*one, *more} if one.get(name) != more.get(name))
        rows[case] = {"files": len(one), "other bytes": other, "seconds": seconds}
        print(case, json.dumps(rows[case]), flush=True)
    given = {name: value for name, value in vars(options).items() if name not in ("out", "cases")}
    atomic_write_json(
        options.out, {"rows": rows, **given, "hardware": hardware(options.device), "versions": versions()}
    )


if __name__ == "__main__":
    main()
