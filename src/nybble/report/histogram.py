"""A layer's histogram as a drawing of its own, for a page that runs no script."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nybble.formats import get_format

WIDE, HIGH = 160.0, 48.0
MOST_LEVELS = 17
"""Of a format with more values, their lines would hide the bars."""


def drawn(picture: Mapping[str, Any] | None) -> dict[str, str]:
    """Paths and texts of a histogram (:mod:`nybble.report.portrait`), heights by the square root; empty without one.

    Returns:
        ``box``; paths ``bars``, ``levels`` (values of the format) and ``thresholds`` (bands, where they are known);
        ``says``, the same in words.
    """
    if not picture or not any(picture["counts"]):
        return {}
    edge, counts = picture["edge"], picture["counts"]
    step, top = WIDE / len(counts), max(counts)
    grid = [float(value) for value in get_format(picture["format"]).grid] if "format" in picture else []
    bands = [[_place(value, edge) for value in band] for band in picture.get("thresholds", ())]
    bars = "".join(
        f"M{i * step:.1f} {HIGH:g}V{HIGH * (1 - (count / top) ** 0.5):.1f}h{step:.1f}V{HIGH:g}z"
        for i, count in enumerate(counts)
        if count
    )
    shown = grid if len(grid) <= MOST_LEVELS else []
    says = f"{sum(counts):,} weights, {len(grid)} levels"
    return {
        "box": f"0 0 {WIDE:g} {HIGH:g}",
        "bars": bars,
        "levels": "".join(f"M{_place(value, edge):.1f} 0V{HIGH:g}" for value in shown),
        "thresholds": "".join(f"M{low:.1f} 0h{max(0.4, high - low):.1f}V{HIGH:g}H{low:.1f}z" for low, high in bands),
        "says": says + (f", {len(bands)} thresholds" if bands else ""),
    }


def _place(value: float, edge: float) -> float:
    """Where a value is, from the left."""
    return min(WIDE, max(0.0, WIDE * (value + edge) / (2 * edge)))
