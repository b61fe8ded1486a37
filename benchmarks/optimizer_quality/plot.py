"""The study's curves as one picture: training losses, and how far each optimizer is from its 32-bit twin on the way.

    python -m benchmarks.optimizer_quality.plot [--record FILE] [--out docs/optimizer_quality.png]

Means over seeds. Shaded: within the bars.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.optimizer_quality.__main__ import RECORD
from benchmarks.optimizer_quality.optimizers import CHOICES
from benchmarks.optimizer_quality.summary import BARS
from benchmarks.optimizer_quality.tasks import NAMES, task_class

from nybble.core.files import atomic_write_bytes

Curves = dict[str, np.ndarray[Any, np.dtype[np.float64]]]
COLORS = {  # after Okabe and Ito, by rule and bits
    "AdamW": "#000000", "AdamW-32": "#9a9a9a", "AdamW8bit": "#0072b2", "AdamW4bit": "#d55e00", "Factor4bit": "#cc79a7",
    "AdamWFp8": "#56b4e9", "AdamW8bit-residual8": "#7a5cb8", "Lion": "#5a6e00", "Lion8bit": "#8fae00",
    "Muon": "#006b4f", "Muon8bit": "#009e73", "Muon4bit": "#e69f00", "bitsandbytes-AdamW8bit": "#8c6d46",
    "AdamW4bit-all": "#f2a57d", "torchao-AdamW8bit": "#b0492f", "torchao-AdamW4bit": "#e377a0",
}  # fmt: skip
SMOOTH = 5  # points of a curve that are averaged for differences
LEAST, LARGEST = 1.35, 6.0  # per cent that a lower panel reaches to each side
LINE = 0.155  # inches of a label  # between labels, of an axis's height


def curves(runs: list[dict[str, Any]], task: str) -> Curves:
    """Mean of each optimizer's curves over seeds; the longest common ones."""
    found: dict[str, list[list[float]]] = {}
    for run in runs:
        if run["task"] == task and run["optimizer"] in COLORS:
            found.setdefault(run["optimizer"], []).append([np.nan if x is None else x for x in run["curve"]])
    return {name: np.mean(np.array(found[name]), axis=0) for name in COLORS if name in found}


def smoothed(y: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Running means; fewer values at the ends."""
    weight = np.ones(min(SMOOTH, len(y)))
    return np.convolve(y, weight, "same") / np.convolve(np.ones(len(y)), weight, "same")


def spread_out(places: Sequence[float], low: float, high: float, gap: float) -> list[float]:
    """Places of labels, in the same order, at least a gap from each other where there is room."""
    order = np.argsort(places)
    y = np.clip(np.array(places, dtype=float)[order], low, high)
    gap = min(gap, (high - low) / max(1, len(y) - 1))
    for _ in range(200):
        for i in range(1, len(y)):
            if y[i] - y[i - 1] < gap:
                middle = (y[i] + y[i - 1]) / 2
                y[i - 1], y[i] = middle - gap / 2, middle + gap / 2
        y += max(0.0, low - y[0]) - max(0.0, y[-1] - high) if len(y) else 0
    out = [0.0] * len(y)
    for i, where in enumerate(order):
        out[int(where)] = float(y[i])
    return out


def draw(runs: list[dict[str, Any]], out: Path) -> None:
    """Two panels a task, three tasks a row."""
    from matplotlib.figure import Figure

    tasks = [task for task in NAMES if any(run["task"] == task for run in runs)]
    across = min(3, len(tasks))
    down = -(-len(tasks) // across)
    figure = Figure(figsize=(5.4 * across, 5.6 * down), dpi=110)
    grid = figure.add_gridspec(down, across, wspace=0.62, hspace=0.26, left=0.05, right=0.9, top=0.93, bottom=0.07)
    for i, task in enumerate(tasks):
        cell = grid[i // across, i % across].subgridspec(2, 1, height_ratios=(1, 1.5), hspace=0.08)
        upper = figure.add_subplot(cell[0])
        panel(upper, figure.add_subplot(cell[1], sharex=upper), runs, task)
    seeds = len({run["seed"] for run in runs})
    means = "one seed" if seeds == 1 else f"means of {seeds} seeds"
    figure.suptitle(f"Low-bit optimizers and 32-bit ones on the same data in the same order, {means}", fontsize=13)
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    atomic_write_bytes(out, content.getvalue())


def panel(upper: Any, lower: Any, runs: list[dict[str, Any]], task: str) -> None:
    """Losses above, per cent from the twin's below, with the bars."""
    found, kind = curves(runs, task), task_class(task)
    steps = max(run["steps"] for run in runs if run["task"] == task)
    shifts = {}
    for name, y in found.items():
        x = (np.arange(len(y)) + 0.5) * steps / len(y)
        wide = 1.6 if CHOICES[name].bits < 32 else 1.1
        upper.plot(x, y, color=COLORS[name], linewidth=wide, alpha=0.9, zorder=1 if CHOICES[name].bits < 32 else 2)
        twin = CHOICES[name].twin
        if twin in found and len(found[twin]) == len(y):
            shifts[name] = 100 * (smoothed(y) / smoothed(found[twin]) - 1)
            lower.plot(x, shifts[name], color=COLORS[name], linewidth=wide)
    low, high = limits(shifts)
    for bits, bar in BARS.items():
        lower.axhspan(-bar, bar, color="#000000", alpha=0.045, linewidth=0)
        lower.text(0.012 * steps, bar, f"{bits} bits: {bar:g} %", fontsize=6.5, color="#777777", va="bottom")
    lower.axhline(0, color="#000000", linewidth=0.8)
    lower.set_ylim(low, high)
    lower.set_xlim(0, steps)
    labels(lower, {name: y[-1] for name, y in shifts.items()}, steps, low, high)
    bottom, top = np.nanpercentile(np.concatenate(list(found.values())), (0, 99.5))
    upper.set_ylim(bottom - 0.04 * (top - bottom), top + 0.04 * (top - bottom))  # single peaks may leave it
    labels(upper, {name: y[-1] for name, y in found.items() if not CHOICES[name].twin}, steps, *upper.get_ylim())
    upper.set_title(kind.title, fontsize=11, loc="left", fontweight="bold")
    upper.set_ylabel(f"training loss,\n{kind.unit}", fontsize=8)
    lower.set_ylabel("loss from the 32-bit twin's, %", fontsize=8)
    lower.set_xlabel("step", fontsize=8)
    upper.tick_params(labelsize=7, labelbottom=False)
    lower.tick_params(labelsize=7)
    for axis in (upper, lower):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd", linewidth=0.5)


def limits(shifts: Curves) -> tuple[float, float]:
    """Of the lower panel: the bars and what stays near them after the first fifth; peaks may leave it."""
    late = np.concatenate([y[len(y) // 5 :] for y in shifts.values()] or [np.zeros(1)])
    low, high = np.nan_to_num(np.nanpercentile(late, (1, 99)))
    return max(-LARGEST, min(-LEAST, 1.15 * low)), min(LARGEST, max(LEAST, 1.15 * high))


def labels(axis: Any, ends: dict[str, float], steps: int, low: float, high: float) -> None:
    """Each curve's name at its end, apart from each other."""
    edge = 0.03 * (high - low)
    named = {name: float(np.clip(np.nan_to_num(y, nan=high), low, high)) for name, y in ends.items()}
    inches = axis.get_window_extent().height / axis.figure.dpi
    places = spread_out(list(named.values()), low + edge, high - edge, LINE / inches * (high - low))
    for (name, end), y in zip(named.items(), places, strict=True):
        axis.plot([steps, 1.035 * steps], [end, y], color=COLORS[name], linewidth=0.7, clip_on=False)
        text = name if ends[name] == ends[name] else f"{name} (diverged)"
        axis.text(1.045 * steps, y, text, color=COLORS[name], fontsize=7.5, va="center", clip_on=False)


def main() -> None:
    """Draw the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--out", type=Path, default=Path("docs/optimizer_quality.png"))
    asked = parser.parse_args()
    draw(json.loads(asked.record.read_text(encoding="utf-8"))["runs"], asked.out)


if __name__ == "__main__":
    main()
