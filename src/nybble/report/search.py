"""The page of a search: what the budget bought, the Pareto front, each layer's bits against its sensitivity."""

from __future__ import annotations

import math
from typing import Any

from nybble.report.page import fill

WIDE, HIGH, EDGE = 560.0, 220.0, 12.0
Points = list[tuple[float, float, str]]


def render(result: dict[str, Any]) -> str:
    """Make the page.

    Args:
        result: of :func:`nybble.pipelines.search.search`.

    Raises:
        UsageError: Jinja2 is missing.
    """
    compared = [row for row in result["compared"] if not row["name"].startswith("random ")]
    drawn = sorted(row["kl"] for row in result["compared"] if row["name"].startswith("random "))
    front = [
        (point["cost"], _log(point["loss"]), f"{point['cost']:g}: {point['loss']:.4g}") for point in result["front"]
    ]
    layers = [
        (_log(max(row["sensitivity"]) / row["elements"]), row["bits"], f"{row['name']}: {row['weights']}")
        for row in result["layers"]
    ]
    return fill(
        "search.html.j2",
        "",
        {
            "result": result,
            "compared": compared,
            "drawn": {"count": len(drawn), "best": drawn[0], "middle": drawn[len(drawn) // 2], "worst": drawn[-1]}
            if drawn
            else None,
            "box": f"0 0 {WIDE:g} {HIGH:g}",
            "front": _placed(front),
            "layers": _placed(layers),
            "method": result["request"]["method"],
            "version": result["versions"].get("nybble", ""),
        },
    )


def _log(value: float) -> float:
    return math.log10(max(value, 1e-30))


def _placed(points: Points) -> list[dict[str, Any]]:
    """Points of a plot in its own units, larger values higher."""
    if not points:
        return []
    across, upwards = [x for x, _, _ in points], [y for _, y, _ in points]
    left, width = min(across), (max(across) - min(across)) or 1.0
    low, height = min(upwards), (max(upwards) - min(upwards)) or 1.0
    return [
        {
            "x": round(EDGE + (x - left) / width * (WIDE - 2 * EDGE), 2),
            "y": round(HIGH - EDGE - (y - low) / height * (HIGH - 2 * EDGE), 2),
            "title": title,
        }
        for x, y, title in points
    ]
