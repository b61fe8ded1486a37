"""The ladder: ten language models of two architectures, 0.3M to 30M parameters, trained on the same English text.

    make ladder            or: python -m benchmarks.ladder [FOLDER] [--sizes 0.3m 1m ...] [--architectures llama neox]
        [--minutes 25] [--steps N] [--device cuda|cpu] [--jobs N] [--eager] [--record FILE]

FOLDER (build/ladder) gets the text (text.py; Debian's packages are downloaded if it isn't there yet) and ``models/``
with a transformers folder per model, beside them ``ladder.json``: parameters, tokens, losses, seconds, hardware,
versions. Each model is a process of its own; on a GPU all start at once, so that one's compilation overlaps with
another's steps. ``--minutes`` is for everything after the text, on one H100: fewer than 25 give each model the same
share of its tokens. A model trained again takes the place of the earlier one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.ladder.sizes import ARCHITECTURES, CONTEXT, SIZES, names, plan
from benchmarks.ladder.text import VOCABULARY, prepare

from nybble.core.files import atomic_write_bytes

STARTING = 75.0  # seconds of a GPU's time: imports and compilation, and judging at the end
JUDGING = 30.0  # of these
CPU_OPERATIONS = 2.5e10  # a second and core, as the smallest model was seen to do


def main() -> None:
    """Prepare, plan, train, collect."""
    asked = arguments()
    chosen = names(tuple(asked.architectures), tuple(asked.sizes))
    steps = planned(chosen, asked)  # before the text, which takes minutes: what can't be trained is refused at once
    corpus = prepare(asked.folder)
    print(", ".join(f"{name}: {count} steps" for name, count in steps.items()), flush=True)
    started = time.monotonic()
    failed = train_all(steps, asked)
    seconds = time.monotonic() - started
    collect(asked.folder, corpus, asked.record, {"seconds": round(seconds, 1), "models": chosen, "jobs": asked.jobs})
    if failed:
        raise SystemExit(f"not trained: {', '.join(failed)}; see {asked.folder / 'models'}/NAME.log")


def planned(chosen: list[str], asked: argparse.Namespace) -> dict[str, int]:
    """Steps of each model; on a CPU whole trainings, if they end within the time that was given."""
    if asked.steps:
        return dict.fromkeys(chosen, asked.steps)
    if asked.device == "cuda":
        return plan(chosen, 60 * asked.minutes - STARTING, len(gpus()))
    rungs = [SIZES[name.split("-", 1)[1]] for name in chosen]
    operations = sum(6 * (rung.parameters + VOCABULARY * rung.width) * rung.tokens for rung in rungs)
    minutes = operations / (CPU_OPERATIONS * (os.cpu_count() or 1)) / 60
    if minutes > asked.minutes:
        raise SystemExit(
            f"without a GPU {', '.join(chosen)} take about {minutes:,.0f} minutes, more than --minutes"
            f" {asked.minutes:g}: choose fewer (--sizes 0.3m), give more, or --steps for a short training"
        )
    return plan(chosen, math.inf)


def gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls each GPU; models take turns over them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def train_all(steps: dict[str, int], asked: argparse.Namespace) -> list[str]:
    """Run a process for each model, so many at once; return the names of those that failed."""
    models = asked.folder / "models"
    models.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * asked.minutes - (JUDGING if asked.device == "cuda" else 0)
    places = gpus()
    waiting, running, failed = list(steps), dict[str, subprocess.Popen[bytes]](), list[str]()
    try:
        while waiting or running:
            while waiting and len(running) < asked.jobs:
                name = waiting.pop(0)
                place = places[list(steps).index(name) % len(places)] if places else None
                running[name] = start(name, steps[name], until - time.monotonic(), place, asked)
            time.sleep(0.2)
            for name in [name for name, process in running.items() if process.poll() is not None]:
                wrong = running.pop(name).returncode != 0
                lines = (models / f"{name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
                print("\n".join([f"{name} FAILED:", *lines[-15:]] if wrong else lines[-1:]), flush=True)
                failed += [name] if wrong else []
    finally:
        for process in running.values():
            process.terminate()
    return failed


def start(name: str, steps: int, seconds: float, gpu: str | None, asked: argparse.Namespace) -> subprocess.Popen[bytes]:
    """The process that trains a model; what it prints goes to models/NAME.log."""
    command = [sys.executable, "-m", "benchmarks.ladder.train", str(asked.folder), "--model", name]
    command += ["--steps", str(steps), "--device", asked.device]
    command += [] if asked.steps else ["--seconds", str(seconds)]
    command += ["--eager"] if asked.eager else []
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    if asked.device == "cuda":
        threads = str(max(1, (os.cpu_count() or 1) // asked.jobs))
        environment |= {"TORCHINDUCTOR_COMPILE_THREADS": threads, "OMP_NUM_THREADS": threads}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    with (asked.folder / "models" / f"{name}.log").open("w", encoding="utf-8") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def collect(folder: Path, corpus: dict[str, Any], record: Path | None, run: dict[str, Any]) -> None:
    """Write ladder.json: every model that the folder has, the smallest first, the text, and the latest run."""
    found = {}
    for name in reversed(names()):
        path = folder / "models" / name / "training.json"
        if path.exists():
            found[name] = json.loads(path.read_text(encoding="utf-8"))
    result = {"corpus": corpus, "context": CONTEXT, "latest_run": run, "models": found}
    for place in (folder / "models" / "ladder.json", record):
        if place is not None:
            atomic_write_bytes(place, (json.dumps(result, indent=1) + "\n").encode())


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line; ``given``: what comes behind the command, instead of that of this process."""
    import torch

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ladder", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build/ladder"))
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--minutes", type=_above_zero(float), default=25.0)
    parser.add_argument("--steps", type=_above_zero(int), help="of each model, however long it takes")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=_above_zero(int), help="models at once; all on a GPU, one on a CPU")
    parser.add_argument("--eager", action="store_true", help="don't compile")
    parser.add_argument("--record", type=Path, help="another place for ladder.json")
    asked = parser.parse_args(given)
    asked.sizes, asked.architectures = list(dict.fromkeys(asked.sizes)), list(dict.fromkeys(asked.architectures))
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here; --device cpu trains the smallest (--sizes 0.3m)")
    asked.jobs = asked.jobs or (len(asked.sizes) * len(asked.architectures) if asked.device == "cuda" else 1)
    asked.eager |= asked.device == "cpu"
    return asked


def _above_zero(kind: type[int] | type[float]) -> Callable[[str], float]:
    """What reads a number above zero, for argparse."""

    def number(text: str) -> float:
        found = kind(text)
        if not 0 < found < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is no number above 0")
        return found

    number.__name__ = kind.__name__  # argparse says "invalid int value"
    return number


if __name__ == "__main__":
    main()
