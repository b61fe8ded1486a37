"""Low-bit optimizers against 32-bit ones on six kinds of task: the loss on held-out data, same seeds, same data.

    python -m benchmarks.optimizer_quality --pack build/optq/optq.zip      once, on Debian 12: the data in one file
    python -m benchmarks.optimizer_quality --data build/optq/optq.zip --device cuda --jobs 6 --seeds 0 1 2
        [--tasks lm ...] [--optimizers AdamW AdamW8bit ...] [--seconds 500] [--missing] [--record FILE] [--mode graph]

An estimate is printed first. Several workers share a GPU (``--jobs``), because an optimizer's step leaves it idle in
between; with several GPUs they take turns over them. Results are written after each run; ``--missing`` leaves out what
the record has already; no run begins later than ``--seconds``. Seeds come one after another, so that what time allows
is whole. ``python -m benchmarks.optimizer_quality.plot`` draws the curves, benchmarks/tables.py writes the table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from pathlib import Path

import torch
from benchmarks.optimizer_quality.optimizers import CHOICES, suited
from benchmarks.optimizer_quality.record import Record, Run, expected
from benchmarks.optimizer_quality.tasks import NAMES, task_class
from benchmarks.optimizer_quality.train import plan
from benchmarks.optimizer_quality.workers import Place, named, work

RECORD = Path("benchmarks/results/optimizer_quality.json")


def main() -> None:
    """Pack, or train what was asked for."""
    asked = arguments()
    if asked.pack:
        from benchmarks.optimizer_quality.pack import pack

        print(json.dumps(pack(asked.pack, asked.raw, asked.ladder, asked.fashion), indent=1))
        print(f"{asked.pack}: {asked.pack.stat().st_size / 1e6:.1f} MB")
        return
    record = Record(asked.record)
    steps = {task: plan(task, asked.changes, asked.tiny).steps for task in asked.tasks}
    runs = [run for run in wanted(asked) if not (asked.missing and record.has(run, steps[run[1]]))]
    announce(runs, asked, record)
    if asked.dry:
        return
    places = [
        Place(data=asked.data, device=device, mode=asked.mode, changes=asked.changes, tiny=asked.tiny)
        for device in itertools.islice(itertools.cycle(asked.devices), asked.jobs)
    ]
    left, failed = work(runs, places, asked.seconds, record)
    if left:
        print(f"not begun: {', '.join(map(named, left))}; --missing goes on with them")
    if failed:
        raise SystemExit(f"failed: {', '.join(map(named, failed))}")


def wanted(asked: argparse.Namespace) -> list[Run]:
    """Every run, seed after seed; with the 32-bit ones that low-bit ones are judged against."""
    found = []
    for seed in asked.seeds:
        for task in asked.tasks:
            own = suited(task, task_class(task).muon)
            named = [name for name in asked.optimizers or own if task_class(task).muon or not CHOICES[name].muon]
            twins = [twin for name in named if (twin := CHOICES[name].twin)]
            found += [(seed, task, name) for name in CHOICES if name in {*named, *twins}]
    return found


def announce(runs: list[Run], asked: argparse.Namespace, record: Record) -> None:
    """Say what will run, and about how long."""
    seconds = {task: [expected(run, record) for run in runs if run[1] == task] for task in asked.tasks}
    for task, each in seconds.items():
        print(f"{task}: {len(each)} runs, about {sum(each):.0f} s one after another")
    whole = sum(map(sum, seconds.values()))
    print(
        f"{len(runs)} runs, {whole / 60:.1f} minutes one after another (H100; guessed where none was measured), "
        f"{asked.jobs} at once on {max(1, len(asked.devices))} device(s)",
        flush=True,
    )


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m benchmarks.optimizer_quality", description=__doc__, formatter_class=as_it_is
    )
    parser.add_argument("--pack", type=Path, help="write the data's file, and train nothing")
    parser.add_argument("--raw", type=Path, default=Path("build/optq/raw"), help="for --pack: packages")
    parser.add_argument("--ladder", type=Path, default=Path("build/ladder"), help="for --pack: its folder")
    parser.add_argument("--fashion", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="for --pack")
    parser.add_argument("--data", type=Path, default=Path("build/optq/optq.zip"))
    parser.add_argument("--tasks", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--optimizers", nargs="+", choices=list(CHOICES), help="those of the study that are installed")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, help="at once: 6 on a GPU, 1 on a CPU")
    parser.add_argument("--mode", choices=("graph", "compile", "compile+graph", "eager"), help="graph on a GPU")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no run begins later")
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--missing", action="store_true", help="only what the record has not")
    parser.add_argument("--steps", type=int, help="of every run")
    parser.add_argument("--tiny", action="store_true", help="small networks, few steps: whether everything runs")
    parser.add_argument("--dry", action="store_true", help="the estimate alone")
    asked = parser.parse_args(given)
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    gpus = torch.cuda.device_count() if asked.device == "cuda" else 0
    asked.devices = [f"cuda:{i}" for i in range(gpus)] or ["cpu"]
    asked.jobs = asked.jobs or (6 * gpus or 1)
    asked.mode = asked.mode or ("graph" if gpus else "eager")
    asked.changes = {"steps": asked.steps} if asked.steps else {}
    asked.seeds = sorted(set(asked.seeds))
    return asked


if __name__ == "__main__":
    main()
