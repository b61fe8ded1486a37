"""The page of a search: what the budget bought, the Pareto front, each layer's bits against its sensitivity."""

from __future__ import annotations

from typing import Any

from nybble.report.page import fill, joined


def render(result: dict[str, Any]) -> str:
    """Make the page.

    Args:
        result: of :func:`nybble.pipelines.search.search`. Of a search in training there are no losses to chart: the
            page of its model has what was learned.

    Raises:
        UsageError: Jinja2 is missing.
    """
    compared = [row for row in result["compared"] if not row["name"].startswith("random ")]
    drawn = sorted(row["kl"] for row in result["compared"] if row["name"].startswith("random "))
    return fill(
        "search.html.j2",
        joined("plot.js", "search.js"),
        {
            "result": result,
            "compared": compared,
            "drawn": {"count": len(drawn), "best": drawn[0], "middle": drawn[len(drawn) // 2], "worst": drawn[-1]}
            if drawn
            else None,
            "drawing": _drawing(result, compared),
            "method": result["request"]["method"],
            "version": result["versions"].get("nybble", ""),
        },
    )


def _drawing(result: dict[str, Any], compared: list[dict[str, Any]]) -> dict[str, Any]:
    """What the charts show."""
    layers = [
        {
            "name": row["name"], "weights": row["weights"], "bits": row["bits"],
            "sensitivity": max(row["sensitivity"]) / row["elements"],
        }
        for row in result["layers"] if "sensitivity" in row
    ]  # fmt: skip
    points = [{key: row[key] for key in ("name", "cost", "loss")} for row in compared if "loss" in row]
    return {"unit": result["unit"], "front": result["front"], "compared": points, "layers": layers}
