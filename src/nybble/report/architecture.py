"""The page of a search of an architecture: what was found, its rivals, the front, what each part has."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from nybble.report.page import fill, joined


def render(result: dict[str, Any], pictures: Mapping[str, bytes] | None = None) -> str:
    """Make the page.

    Args:
        result: of :func:`nybble.pipelines.search_architecture.search_architecture`.
        pictures: by caption, a PNG.

    Raises:
        UsageError: Jinja2 is missing.
    """
    shown = {caption: base64.b64encode(png).decode() for caption, png in (pictures or {}).items()}
    return fill(
        "architecture.html.j2",
        joined("plot.js", "architecture.js"),
        {
            "result": result,
            "tables": [
                (title, *_table(result[key]))
                for key, title in (("compared", "Compared"), ("parts", "Parts"))
                if result[key]
            ],
            "encoding": {key: _shown(value) for key, value in result["encoding"].items()},
            "pictures": shown,
            "drawing": {key: result[key] for key in ("front", "unit", "score")},
            "method": result["request"]["method"],
            "version": result["versions"].get("nybble", ""),
        },
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """Columns in the order in which they come, and cells: words, and whether they are numbers."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return columns, [[(_shown(row.get(key)), not isinstance(row.get(key), str)) for key in columns] for row in rows]


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return ", ".join(map(_shown, value)) if isinstance(value, list | tuple) else str(value)
