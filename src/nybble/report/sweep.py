"""The page of a sweep: how it stands, curves with intervals, rows."""

from __future__ import annotations

from typing import Any

from nybble.report.page import fill, joined


def render(data: dict[str, Any]) -> str:
    """Make the page.

    Args:
        data: ``name``, ``version``, ``line``; ``counts``, (state, runs); ``failed`` and ``illegal``, (reason, runs);
            ``columns``, ``rows`` of texts and their ``states``, out of ``total``, of which ``where`` holds; ``x``,
            ``y`` and ``curves``, with a name and points (x, mean, low, high, count).

    Raises:
        UsageError: Jinja2 is missing.
    """
    drawing = {name: data[name] for name in ("x", "y", "curves")}
    return fill("sweep.html.j2", joined("plot.js", "sweep.js"), {**data, "drawing": drawing})
