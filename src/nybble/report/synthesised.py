"""The page of synthesised images: some of each round, and what the model makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nybble.report.page import fill
from nybble.report.png import data_url, grid

COLUMNS, MOST = 10, 40


def render(result: dict[str, Any], rounds: Sequence[np.ndarray]) -> str:
    """Make the page.

    Args:
        result: of :func:`nybble.pipelines.synthesise.synthesise`.
        rounds: images of each kept round, uint8 [count, height, width] or [count, height, width, channels].

    Raises:
        UsageError: Jinja2 is missing.
    """
    pictures = [data_url(grid(images[:MOST], COLUMNS)) for images in rounds]
    return fill(
        "synthesised.html.j2",
        "",
        {
            "result": result,
            "rounds": list(zip(result["rounds"], pictures, strict=True)),
            "version": result["versions"].get("nybble", ""),
        },
    )
