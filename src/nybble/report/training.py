"""The page about a training run: losses and answers before and after, curves, what was learned, memory by part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from nybble.report.histogram import drawn
from nybble.report.learning import HIGH, WIDE, path_of
from nybble.report.page import fill
from nybble.report.tables import change
from nybble.report.words import METRICS, flatten, number, percent, size, task_of

POINTS = 200
MEMORY = {
    "base, packed": "codes and scales of the frozen weights",
    "base, in float": "embeddings, norms and what else is not packed",
    "adapters": "what trains",
    "weights": "float32, and buffers",
    "model": "codes, embeddings and what else stays as it is",
    "learned": "scales, thresholds and what else parts learn",
    "gradients": "of what trains",
    "optimizer states": "kept between updates",
    "kept for backward": "activations that one forward keeps for its backward",
    "rest": "what the allocator's peak has beyond all these: activations and dequantized weights in passing",
}
MODELS = {"float": "Float", "before": "Before", "after": "After"}
LEFT_OUT = ("curve", "losses", "callbacks", "memory", "evaluation")
LEARNED = ("codes", "scales", "input_scales")


def render_training(data: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] = (), link: str = "") -> str:
    """Make the page.

    Args:
        data: what training.json holds, checked.
        rows: of the layers, as nybble.json holds them, checked.
        link: another page, about the model that came out; empty: there is none.

    Returns:
        HTML; every text in it that came from ``data`` is escaped, and it runs no script.

    Raises:
        UsageError: Jinja2 is missing.
    """
    evaluation, curve = data["evaluation"], data["curve"]
    stages = data.get("stages", [data["steps"]])
    values = {
        "name": f"{data['method']} on {data['model']}",
        "link": link,
        "tiles": _tiles(data),
        "models": [] if evaluation is None else [MODELS.get(name, name) for name in evaluation["models"]],
        "metrics": [] if evaluation is None else metric_rows(evaluation["models"]),
        "samples": [] if evaluation is None else evaluation["samples"],
        "path": path_of(thinned(curve)),
        "curve_box": f"0 0 {WIDE:g} {HIGH:g}",
        "borders": borders(stages),
        "stages": [f"{steps:,}" for steps in stages],
        "first": number(curve[0][1]) if curve else "",
        "last": number(curve[-1][1]) if curve else "",
        "losses": [_loss(name, curve, found) for name, found in data.get("losses", {}).items()],
        "callbacks": [_callback(name, curve, found) for name, found in data.get("callbacks", {}).items()],
        "learned": learned_rows(rows),
        "memory": memory_rows(data["memory"]),
        "manifest": flatten({key: value for key, value in data.items() if key not in LEFT_OUT}),
        "version": data["versions"]["nybble"],
    }
    return fill("training.html.j2", "", values)


def metric_rows(models: Mapping[str, Mapping[str, float]]) -> list[tuple[str, list[str], str]]:
    """Title, a text for each model, change from before to after."""
    before, after = models["before"], models["after"]
    return [
        (METRICS.get(key, key), [number(found.get(key)) for found in models.values()], change(before[key], after[key]))
        for key in before
    ]


def learned_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Layers of which training says something: name, quantizer, share of other codes, ratios of scales, histogram."""
    found = []
    for row in rows:
        learned, picture = row.get("learned") or {}, row.get("weight_picture")
        if not picture and not any(key in learned for key in LEARNED):
            continue
        ratios = {key: ", ".join(f"{v:.3f}" for v in learned.get(key, ())) for key in ("scales", "input_scales")}
        codes = percent(learned.get("codes"))
        found.append(
            {"name": row["name"], "weights": row["weights"] or "float", "codes": codes, "drawing": drawn(picture)}
            | ratios
        )
    return found


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


def borders(stages: Sequence[int]) -> list[str]:
    """Where in a curve's drawing each stage but the first begins.

    >>> borders([10, 30]), borders([10])
    (['40.0'], [])
    """
    ends = list(accumulate(stages))
    return [f"{WIDE * end / ends[-1]:.1f}" for end in ends[:-1]]


def _loss(name: str, curve: Sequence[Sequence[float]], values: Sequence[float]) -> dict[str, str]:
    """One of several losses."""
    points = [[step, value] for (step, _), value in zip(curve, values, strict=True)]
    first, last = (number(values[at]) if values else "" for at in (0, -1))
    return {"name": name, "path": path_of(thinned(points)), "first": first, "last": last}


def _callback(name: str, curve: Sequence[Sequence[float]], found: Mapping[str, Any]) -> dict[str, Any]:
    """What one of them said of updates, and of layers: rows under their titles, the sum of counts last."""
    layers = found["layers"]
    titles = [*next(iter(layers.values()), {})]
    together = [sum(row[title] for row in layers.values()) for title in titles]
    rows = [(layer, [f"{row[title]:,}" for title in titles]) for layer, row in layers.items()]
    return {
        "name": name,
        "updates": [_loss(key, curve, values) for key, values in found["updates"].items()],
        "titles": titles,
        "rows": [*rows, ("together", [f"{value:,}" for value in together])],
    }


def _tiles(data: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    task = task_of(data)
    found = [
        ("updates", f"{data['steps']:,}", f"{data['data']['examples']:,} examples"),
        ("parameters train", f"{data['trainable']:,}", f"{data['data']['targets']:,} {task['unit']}"),
    ]
    if data["evaluation"] is not None:
        models, shown = data["evaluation"]["models"], task["shown"]
        says = {name: number(found[shown]) for name, found in models.items() if shown in found}
        below = f"{says['before']} before" + (f", {says['float']} in float" if "float" in says else "")
        title = METRICS.get(shown, shown).partition(" (")[0]
        found.append((f"held out: {title}", says["after"], below))
    return found
