"""What the record says: how far each low-bit optimizer's held-out loss is from its 32-bit twin's, seed by seed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from benchmarks.optimizer_quality.optimizers import CHOICES
from benchmarks.optimizer_quality.tasks import NAMES

BARS = {8: 0.5, 4: 1.0}  # per cent of the 32-bit loss, by the bits of the states
SURE = 2.0  # standard errors


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One optimizer on one task.

    Attributes:
        loss: held out, the mean of its seeds.
        apart: per cent of the twin's loss of the same seed, the mean; None for a 32-bit one without a twin.
        error: standard error of that mean; None of a single seed.
        seeds: how many there are of both.
        bar: per cent; None for 32 bits.
    """

    loss: float
    apart: float | None
    error: float | None
    seeds: int
    bar: float | None

    @property
    def verdict(self) -> str:
        """``within`` the bar, ``over`` it, or ``unclear``: over it by less than two standard errors."""
        if self.apart is None or self.bar is None:
            return ""
        if self.apart <= self.bar:
            return "within"
        if not math.isfinite(self.apart):
            return "over"
        return "over" if self.error is None or self.apart - SURE * self.error > self.bar else "unclear"


def cells(runs: list[dict[str, Any]]) -> dict[tuple[str, str], Cell]:
    """By task and optimizer; twins are compared on the same hardware only."""
    losses: dict[tuple[str, str], dict[tuple[int, str], float]] = {}
    for run in runs:
        machine = run["hardware"]["gpu"] or run["hardware"]["cpu"]
        loss = run["held_out"]["loss"]
        losses.setdefault((run["task"], run["optimizer"]), {})[run["seed"], machine] = loss
    found = {}
    for (task, name), own in losses.items():
        choice = CHOICES[name]
        theirs = losses.get((task, choice.twin or ""), {})
        shifts = [100 * (loss / theirs[seed] - 1) for seed, loss in own.items() if seed in theirs]
        found[task, name] = Cell(
            loss=mean(own.values()),
            apart=mean(shifts) if shifts else None,
            error=stdev(shifts) / len(shifts) ** 0.5 if len(shifts) > 1 else None,
            seeds=len(shifts) or len(own),
            bar=BARS.get(choice.bits),
        )
    return found


def spread(runs: list[dict[str, Any]], task: str, name: str = "AdamW") -> float | None:
    """Standard deviation of a 32-bit loss over seeds, in per cent; None of a single seed."""
    own = [run["held_out"]["loss"] for run in runs if (run["task"], run["optimizer"]) == (task, name)]
    return 100 * stdev(own) / mean(own) if len(own) > 1 else None


def rows(runs: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table: losses of the 32-bit ones, and the others' distances from them in per cent."""
    found = cells(runs)
    tasks = [task for task in NAMES if any(there == task for there, _ in found)]
    sizes = {(run["task"], run["optimizer"]): run["state_bytes"] / run["parameters"] for run in runs}
    made = [["32-bit seeds apart", "", "", *(_percent(spread(runs, task)) for task in tasks)]]
    for name, choice in CHOICES.items():
        own = [found.get((task, name)) for task in tasks]
        if any(own):
            against = f" / {CHOICES[choice.twin].label}" if choice.twin else ""
            weight = f"{sizes[tasks[0], name]:.2f}" if (tasks[0], name) in sizes else ""
            bar = f"{BARS[choice.bits]:g}" if choice.bits in BARS else ""
            made.append([choice.label + against, weight, bar, *(_shown(cell) for cell in own)])
    return ["optimizer / judged against", f"state bytes a parameter, {tasks[0]}", "bar, %", *map(_title, tasks)], made


def _title(task: str) -> str:
    from benchmarks.optimizer_quality.tasks import task_class

    kind = task_class(task)
    return f"{kind.title} ({kind.unit})"


def _percent(x: float | None) -> str:
    return "" if x is None else f"± {x:.2f} %"


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return ""
    if cell.apart is None:
        return f"{cell.loss:.4f}"
    error = "" if cell.error is None else f" ± {cell.error:.2f}"
    text = f"{cell.apart:+.2f}{error} %"
    return {"over": f"**{text}**", "unclear": f"{text} ?"}.get(cell.verdict, text)


def sentence(runs: list[dict[str, Any]]) -> str:
    """How many cells lie within their bars, and which don't."""
    judged = {key: cell for key, cell in cells(runs).items() if cell.verdict}
    by = {
        verdict: [f"`{name}` on {task}" for (task, name), cell in judged.items() if cell.verdict == verdict]
        for verdict in ("within", "over", "unclear")
    }
    parts = [f"{len(by['within'])} of {len(judged)} lie within their bar"]
    parts += [f"over it (bold): {', '.join(by['over'])}"] if by["over"] else []
    parts += [f"over it by less than two standard errors (?): {', '.join(by['unclear'])}"] if by["unclear"] else []
    return "; ".join(parts) + "."
