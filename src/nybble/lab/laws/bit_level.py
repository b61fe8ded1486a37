"""Bit-level scaling: is a larger model in fewer bits better than a smaller one in more, at equal total bits?

Dettmers and Zettlemoyer 2022 (arXiv:2212.09720): within a family of models the points of each series (a width k, or
any other choice) are joined linearly over log2 of a model's total bits. Where curves of two or more series lie over
each other they are compared. A power law in parameters and bits fits badly, says the paper, and parallel curves fit
well; both fits are given.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nybble.core.errors import DataError, UsageError
from nybble.lab.rows import Table, check_columns, columns_of, shown, stored_bytes

Array = NDArray[np.float64]
BUDGETS = 33
"""Places at which curves are compared, evenly over log2 of the total bits."""
SHARE, ALIKE = 0.95, 0.005


def bits_per_parameter(k: int, block: int | None = None, outliers: float = 0.0) -> float:
    """Bits of a weight of ``k`` bits, a 16-bit constant a block, and a share of outliers in 16 bits.

    Raises:
        UsageError: k outside of 1 to 16, a block below 1, or a share outside of [0, 1).
    """
    if not 1 <= k <= 16 or (block is not None and block < 1) or not 0 <= outliers < 1:
        raise UsageError(f"k is 1 to 16, a block 1 or more, outliers from 0 to below 1; got {k}, {block}, {outliers}.")
    return k + (0.0 if block is None else 16 / block) + outliers * (16 - k)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A model of a series: its parameters, log2 of its total bits, what repeats measured; ``error``: of each."""

    size: float
    log2_bits: float
    values: tuple[float, ...]
    error: float = 0.0

    def drawn(self, generator: np.random.Generator, picks: NDArray[np.int64] | None = None) -> float:
        """Draw a mean of a bootstrap: of repeats drawn again (those that all cells draw), each with an error."""
        if picks is None:
            picks = generator.integers(len(self.values), size=len(self.values))
        values = np.asarray(self.values)[picks]
        return float((values + self.error * generator.standard_normal(len(values))).mean())

    @property
    def mean(self) -> float:
        """Of the repeats."""
        return math.fsum(self.values) / len(self.values)


Families = Mapping[str, Mapping[str, Sequence[Cell]]]
"""Family -> series -> cells from small to large."""


@dataclass(frozen=True, kw_only=True)
class Names:
    """Columns: ``family``, ``size`` (parameters), ``total`` bits of the model (bytes, of a name that ends so), ``y``.

    ``by``: series. ``total`` nothing: of all tensors that a run of the kind ``quantize`` stored.

    ``error``: the standard error of ``y``, where there is such a column; ``family`` nothing: all are one. ``paired``: a
    column whose values repeats of all models share, such as the text they were judged on, drawn for all together.
    """

    size: str = "parameters"
    total: str = ""
    y: str = "nll"
    by: tuple[str, ...] = ("bits",)
    family: str = ""
    error: str = ""
    paired: str = ""


def families(rows: Table, names: Names) -> Families:
    """Sort rows into curves.

    Raises:
        UsageError: no such column, or a series that mixes models of one size and several total bits. DataError: none
            has two sizes.
    """
    needed = [names.size, names.total, names.y, *names.by, names.family, names.error, names.paired]
    check_columns([name for name in needed if name], columns_of(rows))
    found: dict[str, dict[str, dict[float, list[tuple[float, float, float]]]]] = {}
    for row in sorted(rows, key=lambda row: str(row.get(names.paired))) if names.paired else rows:
        size, y = _number(row, names.size), _number(row, names.y)
        total = _total_bits(row, names.total)
        if size is None or total is None or y is None or size <= 0 or total <= 0:
            continue
        family = shown(row.get(names.family)) if names.family else ""
        series = ", ".join(shown(row.get(name)) or "none" for name in names.by)
        error = _number(row, names.error) or 0.0 if names.error else 0.0
        found.setdefault(family, {}).setdefault(series, {}).setdefault(size, []).append((total, y, error))
    made = {f: {s: _cells(sizes, s, names) for s, sizes in series.items()} for f, series in found.items()}
    if not any(len(cells) > 1 for series in made.values() for cells in series.values()):
        raise DataError(f"no series of {', '.join(names.by)} has two sizes ({names.size}); a curve needs them.")
    return made


def _cells(sizes: Mapping[float, list[tuple[float, float, float]]], series: str, names: Names) -> list[Cell]:
    cells = []
    for size in sorted(sizes):
        bits, values, errors = zip(*sizes[size], strict=True)
        if max(bits) > (1 + ALIKE) * min(bits):
            raise UsageError(
                f"series {series}, {names.size} {size:g}: models of {min(bits):.6g} to {max(bits):.6g} bits are mixed; "
                "name what differs in --by, or choose with --where."
            )
        error = math.sqrt(math.fsum(e * e for e in errors) / len(errors))
        cells.append(Cell(size=size, log2_bits=math.log2(bits[0]), values=tuple(values), error=error))
    return cells


def _total_bits(row: Mapping[str, Any], name: str) -> float | None:
    if not name:
        return 8.0 * stored_bytes(row)
    found = _number(row, name)
    return found * 8 if found is not None and name.endswith("bytes") else found


def _number(row: Mapping[str, Any], name: str) -> float | None:
    value = row.get(name)
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known and value is not None else None


@dataclass(frozen=True, kw_only=True)
class Best:
    """Which series is best in a family.

    Attributes:
        family: its name. series: that with the least mean excess over the best one, in units of y, over the budgets at
            which it has a curve beside another's.
        sure: series -> the share of bootstrap draws in which it has the least. excess: series -> mean excess; of
            series that lie over no other one there is none.
        budgets: total bits, the best series there, and the share of draws in which it is.
        repeated: whether anything was drawn: without repeats or errors a share of 1 says nothing.
    """

    family: str
    series: str
    sure: Mapping[str, float]
    excess: Mapping[str, float]
    budgets: Sequence[tuple[float, str, float]]
    repeated: bool


def best_series(
    cells: Mapping[str, Sequence[Cell]], family: str, *, high: bool = False, draws: int = 500, paired: bool = False
) -> Best:
    """Compare the curves of a family.

    Args:
        cells: of :func:`families`.
        family: its name.
        high: the largest y is best, as of accuracies.
        draws: of the bootstrap.
        paired: repeats are the same of all models, and drawn together.

    Raises:
        DataError: no two curves lie over each other, or a model lacks some of the repeats.
    """
    curves = {name: list(points) for name, points in cells.items() if len(points) > 1}
    counts = {len(cell.values) for points in curves.values() for cell in points}
    if paired and len(counts) > 1:
        raise DataError(f"family {family}: some models have {min(counts)} repeats and others {max(counts)}.")
    names = list(curves)
    places = [[cell.log2_bits for cell in curves[name]] for name in names]
    budgets = _shared(places, family)
    sign = -1.0 if high else 1.0
    generator = np.random.Generator(np.random.PCG64(0))
    means = [[[cell.mean for cell in curves[name]] for name in names]]
    for _ in range(draws):
        picks = generator.integers(max(counts), size=max(counts)) if paired else None
        means.append([[cell.drawn(generator, picks) for cell in curves[name]] for name in names])
    heights = np.stack([_heights(places, values, budgets) for values in means]) * sign  # [draws, series, budgets]
    beside = (~np.isnan(heights[0])).sum(0) > 1
    heights, budgets = heights[:, :, beside], budgets[beside]
    excess = _mean_excess(heights)
    won = Counter(names[i] for i in np.nanargmin(excess[1:], 1)) if draws else Counter[str]()
    best_at = np.nanargmin(heights, 1)  # [draws, budgets]
    shares = (best_at[1:] == best_at[0]).mean(0) if draws else np.ones(len(budgets))
    return Best(
        family=family, series=names[int(np.nanargmin(excess[0]))],
        sure={name: won[name] / max(1, draws) for name in names},
        excess={name: float(value) for name, value in zip(names, excess[0], strict=True) if not np.isnan(value)},
        budgets=[
            (2.0 ** float(b), names[int(i)], float(s)) for b, i, s in zip(budgets, best_at[0], shares, strict=True)
        ],
        repeated=any(len(cell.values) > 1 or cell.error for points in curves.values() for cell in points),
    )  # fmt: skip


def _shared(places: Sequence[Sequence[float]], family: str) -> Array:
    """Budgets over which two or more curves lie."""
    ends = sorted(end for series in places for end in (series[0], series[-1]))
    grid = np.linspace(ends[0], ends[-1], BUDGETS) if ends else np.zeros(0)
    over = sum((np.array([s[0] <= b <= s[-1] for b in grid]).astype(int) for s in places), np.zeros(len(grid), int))
    if not (over > 1).any():
        raise DataError(
            f"family {family or 'of all models'}: no two curves lie over each other, so nothing can be compared at "
            "equal bits; add sizes between."
        )
    return np.asarray(grid, dtype=np.float64)


def _heights(places: Sequence[Sequence[float]], values: Sequence[Sequence[float]], budgets: Array) -> Array:
    """[series, budgets]; NaN outside of a curve."""
    lines = [np.interp(budgets, x, y, left=np.nan, right=np.nan) for x, y in zip(places, values, strict=True)]
    return np.stack(lines)


def _mean_excess(heights: Array) -> Array:
    """[draws, series]: over the best at each budget, as a mean over a series' own budgets; NaN without any."""
    over = heights - np.nanmin(heights, 1, keepdims=True)
    count = (~np.isnan(over)).sum(2)
    total = np.nansum(over, 2)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """How well two shapes fit log y: R squared of each.

    ``power``: ``log y = a + b log(parameters) + c log(bits a parameter)``; ``parallel``: a square in log(total bits)
    and an offset a series, of which ``offsets`` are to the first one's.
    """

    power: float
    parallel: float
    offsets: Mapping[str, float]


def shapes(cells: Mapping[str, Sequence[Cell]]) -> Shapes:
    """Fit both shapes by least squares to a family whose y is above 0.

    Raises:
        DataError: too few points, or a y that has no logarithm.
    """
    names = [name for name, points in cells.items() if points]
    rows = [
        (i, cell.log2_bits, math.log2(cell.size), cell.mean) for i, name in enumerate(names) for cell in cells[name]
    ]
    index, total, size, y = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    if len(y) <= 2 + len(names) or y.min() <= 0:
        raise DataError(f"{len(y)} points above 0 are too few for {len(names)} parallel curves.")
    own = (index[:, None] == np.arange(len(names))).astype(np.float64)
    centred = total - total.mean()
    power, _ = _solved(np.stack([np.ones_like(y), size, np.log2(total - size)], 1), np.log(y))
    parallel, solved = _solved(np.concatenate([own, centred[:, None], centred[:, None] ** 2], 1), np.log(y))
    offsets = {name: float(solved[i] - solved[0]) for i, name in enumerate(names)}
    return Shapes(power=power, parallel=parallel, offsets=offsets)


def _solved(columns: Array, y: Array) -> tuple[float, Array]:
    solved: Array = np.asarray(np.linalg.lstsq(columns, y, rcond=None)[0], dtype=np.float64)
    left, whole = ((y - columns @ solved) ** 2).sum(), ((y - y.mean()) ** 2).sum()
    return float(1 - left / whole) if whole else 1.0, solved
