"""What the page says of learned parts: a row and a loss curve for every window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]
WIDE, HIGH = 160.0, 32.0
"""Of a curve's drawing, in its own units."""


def windows_of(rows: Sequence[Row], times: Mapping[str, Sequence[float]] | None = None) -> list[Row]:
    """Every window of every reconstruction, in the order of their first layers.

    Args:
        rows: a manifest's layers, checked. The layer that a window begins with has its curve.
        times: seconds by the window's name, in order; None where nobody kept them.

    Returns:
        ``name``, ``loss``, ``before``, ``after``, ``change`` (of the two), ``steps``, ``time``, ``kept``, ``remark``,
        ``path`` (of a curve in a box of :data:`WIDE` x :data:`HIGH`, from 0 to its largest loss; empty without one).
    """
    found: list[Row] = []
    left = {name: list(seconds) for name, seconds in (times or {}).items()}
    for row in rows:
        for window in (row.get("learned") or {}).get("windows", ()):
            if "curve" not in window:
                continue
            seconds = left.get(window["window"])
            before, after = window["before"], window["after"]
            found.append(
                {
                    "name": f"{window['window']}" + (f" ({window['blocks']} blocks)" if window["blocks"] > 1 else ""),
                    "loss": window["loss"],
                    "before": f"{before:.3g}",
                    "after": f"{after:.3g}",
                    "change": f"{100 * (after / before - 1):+.0f} %" if before else "",
                    "steps": f"{window['steps']:,}",
                    "time": _time(seconds.pop(0)) if seconds else "",
                    "kept": window["kept"] if isinstance(window["kept"], str) else f"step {window['kept']:,}",
                    "remark": "diverged" if window["diverged"] else window.get("precision", ""),
                    "path": path_of(window["curve"]),
                }
            )
    return found


def unmoved(rows: Sequence[Row]) -> str:
    """Which learned parts ended where they began, in all their windows, in a line; empty where none did."""
    kept: dict[str, set[bool]] = {}
    for row in rows:
        for window in (row.get("learned") or {}).get("windows", ()):
            kept.setdefault(window["loss"], set()).add(window["kept"] == "start")
    names = [name for name, starts in kept.items() if starts == {True}]
    return f"what was learned came to nothing: {'; '.join(names)}" if names else ""


def _time(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def path_of(curve: Sequence[Sequence[float]]) -> str:
    """An SVG path through points ``[step, loss]``.

    >>> path_of([[0.5, 2.0], [2.5, 1.0]])
    'M0.0 0.0 L160.0 16.0'
    """
    if len(curve) < 2:
        return ""
    first, last, top = curve[0][0], curve[-1][0], max(loss for _, loss in curve)
    if last <= first or top <= 0:
        return ""
    points = [f"{WIDE * (step - first) / (last - first):.1f} {HIGH * (1 - loss / top):.1f}" for step, loss in curve]
    return "M" + " L".join(points)
