"""Trainings as arrays: what a fit of a training law reads, from a store or a CSV file."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nybble.core.errors import DataError, UsageError
from nybble.lab.laws.training import Block, TrainingLaw
from nybble.lab.rows import Table, check_columns, columns_of

Array = NDArray[np.float64]
NAMES: Mapping[str, tuple[str, ...]] = {
    "N": ("N", "parameters"), "D": ("D", "tokens"), "E": ("E", "exponent"), "M": ("M", "mantissa"),
    "B": ("B", "block"), "format": ("format",), "loss": ("loss", "L", "nll"), "twin": ("twin", "twin_loss"),
}  # fmt: skip
"""Columns, and what else they may be called; ``twin``: the loss of the same training in high precision."""
_LAYOUT = re.compile(r"(?i)(?:^|_)e(\d+)m(\d+)")
_WIDE = ("", "none", "float", "bf16", "bfloat16", "fp32", "float32")


@dataclass(frozen=True, kw_only=True)
class Trainings:
    """One entry a training; ``wide``: in high precision, where E, M and log2 B mean nothing.

    ``twin`` is NaN where there is none.
    """

    N: Array
    D: Array
    E: Array
    M: Array
    log2_block: Array
    wide: NDArray[np.bool_]
    loss: Array
    twin: Array

    def __len__(self) -> int:
        return len(self.loss)

    def at(self, chosen: NDArray[Any]) -> Trainings:
        """Some of them, by numbers or a mask."""
        return Trainings(**{name: getattr(self, name)[chosen] for name in self.__dataclass_fields__})


def layout_of(name: str) -> tuple[int, int] | None:
    """Exponent and mantissa bits of a format by its name (``E4M3``, ``float4_e2m1fn``); None of high precision.

    Raises:
        UsageError: a name without ``eXmY``.
    """
    if name.strip().lower() in _WIDE:
        return None
    found = _LAYOUT.search(name.strip())
    if found is None:
        raise UsageError(f"a format is named by its exponent and mantissa bits, as E4M3 or bf16; got {name!r}.")
    return int(found[1]), int(found[2])


def block_of(value: Any) -> Block:
    """A block as a law takes it, of what a table or a person says."""
    if isinstance(value, str) and not value.strip().isdigit():
        return value.strip()
    return int(value)


def trainings(rows: Table, law: TrainingLaw, loss: str | None = None) -> Trainings:
    """Read a table.

    Args:
        rows: with the columns of :data:`NAMES`: N, D, loss; format, or E and M (none: high precision); B; twin.
        law: says what the blocks ``channel`` and ``tensor`` are.
        loss: the column of losses, where it is called otherwise.

    Raises:
        UsageError: a column is missing. DataError: a cell is none of what it should be.
    """
    names = _columns(rows, loss)
    read = [_training(row, names, law, number) for number, row in enumerate(rows, 1)]
    values = np.array(read, dtype=np.float64).reshape(-1, 7).T
    E, M, wide = values[2], values[3], np.isnan(values[2])
    return Trainings(N=values[0], D=values[1], E=E, M=M, log2_block=values[4], wide=wide, loss=values[5],
                     twin=values[6])  # fmt: skip


def with_twins(rows: Table, keys: Sequence[str]) -> Table:
    """Give each training the loss of its twin: the one in high precision that agrees with it in N, D and ``keys``.

    Trainings that have none stay as they are.

    Raises:
        UsageError: no such column. DataError: several could be the twin of one.
    """
    check_columns(keys, columns_of(rows))
    names = _columns(rows, None)
    place = [names["N"], names["D"], *keys]
    twins: dict[str, Any] = {}
    for row in rows:
        if _bits(row, names) is None:
            at = repr([row.get(name) for name in place])
            if at in twins:
                raise DataError(f"several trainings in high precision agree in {', '.join(place)}: name what differs.")
            twins[at] = row[names["loss"]]
    return [{**row, "twin": twins.get(repr([row.get(name) for name in place]))} for row in rows]


def _columns(rows: Table, loss: str | None) -> dict[str, str]:
    known = columns_of(rows)
    found = {name: next((n for n in also if n in known), "") for name, also in NAMES.items()}
    if loss is not None:
        found["loss"] = loss if loss in known else ""
    lost = [name for name in ("N", "D", "loss") if not found[name]]
    if not found["format"] and not (found["E"] and found["M"]):
        lost.append("format (or E and M)")
    if lost:
        raise UsageError(
            f"no column {', '.join(lost)}: a law of training is fitted to N, D, format (or E and M), B and loss; "
            f"there are {', '.join(known) or 'none'}."
        )
    return found


def _training(row: Mapping[str, Any], names: Mapping[str, str], law: TrainingLaw, number: int) -> list[float]:
    """N, D, E, M, log2 B, loss, twin."""
    try:
        N, D, loss = (_number(row, names[name], name) for name in ("N", "D", "loss"))
        bits = _bits(row, names)
        twin = row.get(names["twin"]) if names["twin"] else None
        paired = math.nan if twin in (None, "") else _number(row, names["twin"], "twin")
        if bits is None:
            return [N, D, math.nan, math.nan, 0.0, loss, math.nan]
        law.penalty(N, D, *bits, 1)  # says what is wrong with them
        if not names["B"]:
            raise UsageError("there is no column B, the elements that share a scale.")
        block = law.log2_block(block_of(row.get(names["B"])), N, D)
        return [N, D, *bits, block, loss, paired]
    except (UsageError, TypeError, ValueError) as error:
        raise DataError(f"row {number}: {error}") from error


def _bits(row: Mapping[str, Any], names: Mapping[str, str]) -> tuple[int, int] | None:
    if names["format"]:
        return layout_of(str(row.get(names["format"]) or ""))
    pair = [row.get(names[name]) for name in ("E", "M")]
    if any(value in (None, "") for value in pair):
        return None
    return int(pair[0]), int(pair[1])  # type: ignore[arg-type]


def _number(row: Mapping[str, Any], column: str, name: str) -> float:
    value = row.get(column)
    found = math.nan if value in (None, "") else float(value)
    if not 0 < found < math.inf:
        raise UsageError(f"{name} is a number above 0; got {value!r} in column {column!r}.")
    return found


def check_enough(runs: Trainings, parameters: int) -> None:
    """Raise DataError for fewer trainings than constants, or an axis with too few values to fit an exponent to."""
    if len(runs) <= parameters:
        raise DataError(f"{len(runs)} trainings are too few for a law of {parameters} constants; give more of them.")
    narrow = runs.at(~runs.wide)
    for name, values, least in (("N", runs.N, 2), ("D", runs.D, 2), ("E", narrow.E, 2), ("M", narrow.M, 2)):
        _check_axis(name, values, least)
    if not (narrow.log2_block > 0).any():
        raise DataError("B is 1 everywhere: a scale an element loses nothing by these laws; train in larger blocks.")


def _check_axis(name: str, values: Array, least: int) -> None:
    different: Sequence[float] = sorted(set(values.tolist()))
    if len(different) < least:
        only = f"one value, {different[0]:g}" if different else "no value"
        raise DataError(f"{name} has {only}, and a law needs {least} to fit an exponent: train at other {name}, too.")
