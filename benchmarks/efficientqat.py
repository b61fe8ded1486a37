"""EfficientQAT end to end on SmolLM2 in 2 bits: its two phases, on running text and on instructions.

    python benchmarks/instructions.py build/instructions
    python benchmarks/efficientqat.py --device cuda --manuals build/manuals --instructions build/instructions
        --out benchmarks/results/efficientqat.json

Weights of 2 bits in groups of 64. Block-AP learns from the calibration text of ``--manuals`` (quality/defaults.py says
what is in there); the second phase learns scales alone, on the same text or on instructions to Python's reference and
Debian's packages. Judged: nats a token of perl-doc, which nothing has seen, and nats a target token of instructions
that were held out; GPTQ (both streams) and the float model stand beside.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import nybble
from nybble.core.files import atomic_write_json
from nybble.core.progress import Silent
from nybble.core.versions import versions
from nybble.pipelines.evaluate import run_eval
from nybble.pipelines.load import load_with_origin
from nybble.pipelines.request import build_recipe
from nybble.pipelines.train import train
from nybble.training.tasks import TASKS

W2 = {"weights": "int2 group=64 symmetric=false"}


def judged(model: str, options: argparse.Namespace) -> dict[str, float]:
    """Nats a token of text, and nats a target token of instructions."""
    text = str(options.manuals / "perl-doc.jsonl.xz")
    windows = {"samples": options.windows, "seq_len": options.seq_len}
    found = run_eval({"it": model}, text, metrics=["nll"], device=options.device, **windows)
    made, origin = load_with_origin(model, dtype="bfloat16", device=options.device)
    task = TASKS.get("language")
    held = task.load(str(options.instructions / "held.jsonl"), origin, made, 512, "evaluation")
    told = task.measure(made, origin, held.rows, 8, Silent())
    return {"perl-doc": found["models"]["it"]["nll"], "instructions": told["nll"]}


def main() -> None:
    """Both phases, on both kinds of data; print, write after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2", help="or its GGUF file")
    parser.add_argument("--manuals", type=Path, default=Path("build/manuals"))
    parser.add_argument("--instructions", type=Path, default=Path("build/instructions"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--windows", type=int, default=60, help="of perl-doc")
    parser.add_argument("--seq-len", type=int, default=1024, help="of text; of instructions half of it")
    parser.add_argument("--steps", type=int, default=128, help="of the second phase, 32 examples each")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows: dict[str, Any] = {}
    result = {
        "what": (__doc__ or "").split("\n")[0], "versions": versions(), "samples": options.samples,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "CPU", "steps": options.steps,
        "rows": rows,
    }  # fmt: skip

    def told(name: str, model: str, seconds: float) -> None:
        rows[name] = {**judged(model, options), "seconds": round(seconds, 1)}
        over = {key: round(rows[name][key] - rows["float"][key], 4) for key in ("perl-doc", "instructions")}
        print(f"{name}: {over} nats over float, {seconds:.0f} s", flush=True)
        if options.out:
            atomic_write_json(options.out, result)

    told("float", options.model, 0.0)
    text = str(options.manuals / "calibration.jsonl.xz")
    settings = {"samples": options.samples, "seq_len": options.seq_len, "batch": 8, "device": options.device}
    with tempfile.TemporaryDirectory() as work:
        for recipe in ("gptq", "efficientqat-ap"):
            began, out = time.perf_counter(), Path(work) / recipe
            steps: Any = build_recipe(recipe, scheme=W2)
            nybble.quantize(options.model, steps, text, out=out, form="native", settings=settings)
            told(recipe, str(out), time.perf_counter() - began)
        for name, data, length in (
            ("text", text, options.seq_len),
            ("instructions", str(options.instructions / "train.jsonl"), options.seq_len // 2),
        ):  # fmt: skip
            began, out = time.perf_counter(), Path(work) / name
            train(
                "efficientqat-e2e", Path(work) / "efficientqat-ap", out, data, form="native", progress=Silent(),
                settings={"steps": options.steps, "seq_len": length, "device": options.device},
            )  # fmt: skip
            told(f"efficientqat-ap, then scales on {name}", str(out), time.perf_counter() - began)


if __name__ == "__main__":
    main()
