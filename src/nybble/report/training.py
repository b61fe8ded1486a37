"""The page about a training run: losses and answers before and after, the curve, memory by part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nybble.report.learning import HIGH, WIDE, path_of
from nybble.report.page import fill
from nybble.report.tables import change
from nybble.report.words import METRICS, flatten, number, size, task_of

POINTS = 200
MEMORY = {
    "base, packed": "codes and scales of the frozen weights",
    "base, in float": "embeddings, norms and what else is not packed",
    "adapters": "what trains",
    "gradients": "of what trains",
    "optimizer states": "kept between updates",
    "kept for backward": "activations that one forward keeps for its backward",
    "rest": "what the allocator's peak has beyond all these: activations and dequantized weights in passing",
}
LEFT_OUT = ("curve", "memory", "evaluation")


def render_training(data: Mapping[str, Any]) -> str:
    """Make the page.

    Args:
        data: what training.json holds.

    Returns:
        HTML; every text in it that came from ``data`` is escaped, and it runs no script.

    Raises:
        UsageError: Jinja2 is missing.
    """
    evaluation, curve = data["evaluation"], data["curve"]
    memory = memory_rows(data["memory"])
    values = {
        "name": f"{data['method']} on {data['model']}",
        "tiles": _tiles(data),
        "metrics": [] if evaluation is None else metric_rows(evaluation["models"]),
        "samples": [] if evaluation is None else evaluation["samples"],
        "path": path_of(thinned(curve)),
        "curve_box": f"0 0 {WIDE:g} {HIGH:g}",
        "first": number(curve[0][1]) if curve else "",
        "last": number(curve[-1][1]) if curve else "",
        "memory": memory,
        "manifest": flatten({key: value for key, value in data.items() if key not in LEFT_OUT}),
        "version": data["versions"]["nybble"],
    }
    return fill("training.html.j2", "", values)


def metric_rows(models: Mapping[str, Mapping[str, float]]) -> list[tuple[str, str, str, str]]:
    """Title, before, after, change."""
    before, after = models["before"], models["after"]
    return [(METRICS.get(k, k), number(before[k]), number(after[k]), change(before[k], after[k])) for k in before]


def memory_rows(memory: Mapping[str, int]) -> list[tuple[str, str, str, str]]:
    """Part, meaning, bytes, and the same with a unit; of a GPU also what is left of the peak, and the peak."""
    found = {name: count for name, count in memory.items() if name != "peak"}
    if "peak" in memory:
        found["rest"] = max(0, memory["peak"] - sum(found.values()))
    total = memory.get("peak", sum(found.values()))
    rows = [(name, MEMORY.get(name, ""), f"{count:,}", size(count)) for name, count in found.items()]
    what = "peak, by the allocator" if "peak" in memory else "together"
    return [*rows, (what, "", f"{total:,}", size(total))]


def thinned(curve: Sequence[Sequence[float]]) -> list[list[float]]:
    """At most ``POINTS`` points, each the mean of those that it stands for."""
    step = max(1, -(-len(curve) // POINTS))
    groups = [curve[start : start + step] for start in range(0, len(curve), step)]
    return [[sum(point[i] for point in group) / len(group) for i in (0, 1)] for group in groups]


def _tiles(data: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    task = task_of(data)
    found = [
        ("updates", f"{data['steps']:,}", f"{data['data']['examples']:,} examples"),
        ("parameters train", f"{data['trainable']:,}", f"{data['data']['targets']:,} {task['unit']}"),
    ]
    if data["evaluation"] is not None:
        shown = task["shown"]
        before, after = (data["evaluation"]["models"][key][shown] for key in ("before", "after"))
        title = METRICS.get(shown, shown).partition(" (")[0]
        found.append((f"held out: {title}", number(after), f"{number(before)} before"))
    return found
