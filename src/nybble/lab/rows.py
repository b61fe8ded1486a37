"""Runs as rows: the axes, what came out, and what is known of the run; chosen, ordered, and written as CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from nybble.core.errors import UsageError, did_you_mean
from nybble.lab.kinds import REGISTRY

Table = list[dict[str, Any]]
OWN = ("state", "seconds", "attempt", "error", "key")
"""Columns that every run has, behind its axes and results."""
_WHERE = re.compile(r"([\w.@ -]+?)\s*(!=|<=|>=|=|<|>)\s*(.*)")
_ORDERED: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip


def flat(runs: Iterable[Mapping[str, Any]]) -> Table:
    """A row a run: its labels, its options, results, and :data:`OWN` columns.

    Options are those that aren't at their default in all rows. A result that is called as an axis is ``result.NAME``.
    """
    runs = list(runs)
    used = {name for run in runs for name in run["spec"]["options"]}
    usual = {kind: _defaults(kind, used) for kind in {run["kind"] for run in runs}}
    rows = []
    for run in runs:
        axes = {"kind": run["kind"], **usual[run["kind"]], **run["spec"]["options"], **run["labels"]}
        results = {(f"result.{k}" if k in axes or k in OWN else k): v for k, v in run["result"].items()}
        rows.append({**axes, **results, **{name: run[name] for name in OWN}})
    return rows


def _defaults(kind: str, names: set[str]) -> dict[str, Any]:
    """What these options are where a run doesn't say them; nothing of a kind whose package isn't here."""
    if kind not in REGISTRY:
        return {}
    found = {option.name: option.default for option in dataclasses.fields(REGISTRY.get(kind)) if option.name in names}
    return {name: value for name, value in found.items() if value is not dataclasses.MISSING}


def columns_of(rows: Table) -> list[str]:
    """All columns, in the order in which they come up, those that every run has last."""
    found = dict.fromkeys(name for row in rows for name in row)
    return [*(name for name in found if name not in OWN), *(name for name in OWN if name in found)]


def varying(rows: Table) -> list[str]:
    """The columns in which the rows differ, without keys and tracebacks: what a person wants to see."""
    return [
        name for name in columns_of(rows)
        if name not in ("key", "error", "seconds", "attempt") and len({repr(row.get(name)) for row in rows}) > 1
    ]  # fmt: skip


@dataclass(frozen=True)
class Condition:
    """``column operator value``, as ``bits<=4`` or ``weights=int4*``."""

    column: str
    relation: str
    value: str

    @staticmethod
    def parse(text: str) -> Condition:
        """Raise UsageError for what is none."""
        found = _WHERE.fullmatch(text.strip())
        if found is None:
            raise UsageError(f"a condition is COLUMN=VALUE, or with !=, <, <=, > or >=; got {text!r}.")
        return Condition(*(part.strip() for part in found.groups()))

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Whether a row is meant; one without the column is meant by ``!=`` alone, and by ``=none``."""
        value = row.get(self.column)
        if self.relation in _ORDERED:
            if isinstance(value, bool) or not isinstance(value, int | float):
                return False
            return _ORDERED[self.relation](value, self._number())
        return self._equal(value) == (self.relation == "=")

    def _equal(self, value: Any) -> bool:
        if value is None:
            return self.value.lower() in ("none", "")
        if isinstance(value, int | float) and not isinstance(value, bool):
            try:
                return value == float(self.value)
            except ValueError:
                return False
        return fnmatchcase(str(value).lower(), self.value.lower())

    def _number(self) -> float:
        try:
            return float(self.value)
        except ValueError:
            raise UsageError(f"{self.column}{self.relation}{self.value}: {self.value!r} is no number.") from None


def chosen(rows: Table, where: Sequence[str] = (), sort: Sequence[str] = (), limit: int | None = None) -> Table:
    """Rows that meet all conditions, ordered by columns (``-ppl``: the largest first; none last).

    Raises:
        UsageError: a malformed condition, or a column that there isn't.
    """
    known = columns_of(rows)
    conditions = [Condition.parse(text) for text in where]
    check_columns([*(c.column for c in conditions), *(name.removeprefix("-") for name in sort)], known)
    found = [row for row in rows if all(condition.holds(row) for condition in conditions)]
    for name in reversed(sort):
        down, column = name.startswith("-"), name.removeprefix("-")
        there = [row for row in found if row.get(column) is not None]
        there.sort(key=lambda row: _order(row[column]), reverse=down)
        found = there + [row for row in found if row.get(column) is None]
    return found if limit is None else found[:limit]


def check_columns(names: Iterable[str], known: Sequence[str]) -> None:
    """Raise UsageError for a column that no row has."""
    for name in names:
        if name not in known:
            raise UsageError(f"there is no column {name!r}.{did_you_mean(name, known)}")


def _order(value: Any) -> tuple[int, float, str]:
    if isinstance(value, int | float):
        return (0, float(value), "")
    return (1, 0.0, str(value))


def stored_bytes(row: Mapping[str, Any]) -> int:
    """Bytes of all tensors that a quantized model stores: ``weight_bytes``, or bits a weight times parameters.

    Raises:
        UsageError: a run says neither, or no number above 0.
    """
    bits, count = row.get("result.bits", row.get("bits")), row.get("parameters")
    said = row.get("weight_bytes")
    if said is None and isinstance(bits, int | float) and isinstance(count, int | float):
        said = bits * count / 8
    if not isinstance(said, int | float) or not 0 < said < math.inf:
        raise UsageError(f"{row.get('model', 'a run')}: neither bits and parameters nor weight_bytes, so no size.")
    return round(said)


def shown(value: Any) -> str:
    """A value for people."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value).split("\n", 1)[0]


def as_csv(rows: Table, columns: Sequence[str]) -> str:
    """A table with a heading; numbers in full."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([["" if row.get(name) is None else row[name] for name in columns] for row in rows])
    return text.getvalue()
