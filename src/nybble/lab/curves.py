"""Curves through runs: for each series and place on the x axis the mean of what was measured, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nybble.core.errors import UsageError
from nybble.lab.rows import Table, check_columns, columns_of, shown

DRAWS, SHARE = 2000, 0.95


@dataclass(frozen=True, kw_only=True)
class Point:
    """``x``; ``mean`` of ``count`` runs; ``low`` to ``high``, in which 95 % of bootstrapped means are."""

    x: float
    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A ``name``, and ``points`` from left to right."""

    name: str
    points: tuple[Point, ...]


def curves(rows: Table, x: str, y: str, by: Sequence[str] = ()) -> list[Curve]:
    """A curve for each combination of values of the columns ``by``, by first appearance.

    Runs that agree in ``by`` and ``x`` are repeats. Their interval is the percentile bootstrap of the mean (Efron 1979,
    2,000 draws from a fixed seed); of a single run there is none, ``low`` and ``high`` are NaN.

    Raises:
        UsageError: a column that there isn't, or no two finite numbers to draw.
    """
    check_columns([x, y, *by], columns_of(rows))
    found: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        at, value = _number(row, x), _number(row, y)
        if at is not None and value is not None:
            name = ", ".join(f"{column} {shown(row.get(column)) or 'none'}" for column in by) or y
            found.setdefault(name, {}).setdefault(at, []).append(value)
    if sum(len(places) for places in found.values()) < 2:
        raise UsageError(f"{x} and {y}: no two places have finite numbers in both; there is nothing to draw.")
    return [
        Curve(name=name, points=tuple(_point(at, places[at]) for at in sorted(places)))
        for name, places in found.items()
    ]


def _number(row: Mapping[str, Any], column: str) -> float | None:
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _point(x: float, values: Sequence[float]) -> Point:
    if len(values) == 1:
        return Point(x=x, mean=values[0], low=math.nan, high=math.nan, count=1)
    drawn = np.random.Generator(np.random.PCG64(0)).integers(len(values), size=(DRAWS, len(values)))
    means = np.asarray(values, dtype=np.float64)[drawn].mean(1)
    low, high = np.quantile(means, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return Point(x=x, mean=math.fsum(values) / len(values), low=float(low), high=float(high), count=len(values))
