"""The file of results: one line a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.optimizer_quality.optimizers import CHOICES
from benchmarks.optimizer_quality.tasks import NAMES, task_class

from nybble.core.files import atomic_write_bytes

Run = tuple[int, str, str]  # seed, task, optimizer
DEARER = 1.5  # times what torch's AdamW takes, where nothing was measured


class Record:
    """The file of results: runs by seed, task and optimizer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: dict[Run, dict[str, Any]] = {}
        if path.exists():
            for run in json.loads(path.read_text(encoding="utf-8"))["runs"]:
                self.runs[run["seed"], run["task"], run["optimizer"]] = run

    def has(self, run: Run, steps: int) -> bool:
        """Whether it is there, with so many steps."""
        return run in self.runs and self.runs[run]["steps"] == steps

    def add(self, found: dict[str, Any]) -> None:
        """Take a run in and write the file, in a fixed order."""
        self.runs[found["seed"], found["task"], found["optimizer"]] = found
        ranks = {name: i for i, name in enumerate((*NAMES, *CHOICES))}
        ordered = sorted(self.runs.values(), key=lambda r: (ranks[r["task"]], ranks[r["optimizer"]], r["seed"]))
        lines = ",\n".join("  " + json.dumps(run) for run in ordered)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(self.path, f'{{\n "runs": [\n{lines}\n ]\n}}\n'.encode())


def expected(run: Run, record: Record) -> float:
    """Seconds of a run: as another seed took, or the plan's guess for an H100."""
    known = [found["seconds"] for (_, *what), found in record.runs.items() if tuple(what) == run[1:]]
    return sum(known) / len(known) if known else task_class(run[1]).plan.seconds * (1 if run[2] == "AdamW" else DEARER)
