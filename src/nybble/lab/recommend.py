"""What fits a memory: measured models, formats and recipes, ranked by quality, with weights and KV cache counted.

Runs of the kind ``quantize`` (:mod:`nybble.lab.kinds.quantize`) are the candidates: what differs in the seed, the
calibration data (not in how much of it) or a column that is said to pair them are repeats of one.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nybble.core.errors import DataError, FileError, ModelError, UsageError
from nybble.lab.kv_bytes import SHAPE, KVShape, config_of, kv_bytes, shape_of
from nybble.lab.rows import Table, check_columns, columns_of, stored_bytes

CHANGES = ("target", "scheme", "weights", "activations", "kv", "embeddings", "matmuls")
CALIBRATED = {"samples": None, "seq_len": 512}
"""Options of calibration that a command says where they aren't as usual."""
IDENTITY = ("model", "recipe", "effort", *CHANGES, *CALIBRATED)
JUDGED = ("judged_on", "judged_samples", "judged_len")
SHARE, DRAWS = 0.95, 2000


@dataclass(frozen=True, kw_only=True)
class Budget:
    """``memory`` in bytes, for weights and a cache of ``context`` tokens of ``batch`` texts at a time."""

    memory: int
    context: int
    batch: int = 1


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model as a recipe makes it.

    Attributes:
        options: of the run. weights, cache: bytes. quality: the mean of the repeats, in units of the metric.
        low, high: the middle 95 % of its bootstrap, NaN of a single run. values: of the repeats, by what pairs them.
        sure: the share of draws in which it is the best of those that fit.
    """

    options: Mapping[str, Any]
    weights: int
    cache: int
    quality: float
    values: tuple[float, ...]
    low: float = math.nan
    high: float = math.nan
    sure: float = math.nan

    @property
    def total(self) -> int:
        """Bytes of both."""
        return self.weights + self.cache

    @property
    def command(self) -> str:
        """What makes it."""
        model, recipe = str(self.options["model"]), self.options.get("recipe") or "rtn"
        if recipe == "none":
            return f"nybble generate {shlex.quote(model)} PROMPT   # as it is"
        words = ["nybble", "quantize", model, "OUT", "--recipe", str(recipe)]
        for name in CHANGES:
            if (value := self.options.get(name)) is not None:
                words += [f"--{name}", str(value)]
        if (effort := self.options.get("effort")) not in (None, "full"):
            words += ["--effort", str(effort)]
        for name, usual in {**CALIBRATED, "data": "builtin"}.items():
            if (value := self.options.get(name)) not in (None, usual):
                words += [f"--{name.replace('_', '-')}", str(value)]
        return shlex.join(words)


def recommend(
    rows: Table, budget: Budget, *, metric: str = "nll", high: bool = False, paired: str = ""
) -> list[Candidate]:
    """The candidates that fit, the best first.

    Args:
        rows: of runs: ``model``, ``recipe`` and other options, ``parameters`` and ``bits`` (or ``weight_bytes``).
        budget: what they are to fit.
        metric: the column that is judged.
        high: whether the largest is best.
        paired: a column whose values repeats share (``judged_on``); each candidate needs all of them.

    Raises:
        UsageError: a column is missing, or runs were judged on other data. DataError: nothing fits; it says the least.
    """
    check_columns(["model", metric, *([paired] if paired else [])], columns_of(rows))
    if not (budget.memory > 0 and budget.context > 0 and budget.batch > 0):
        raise UsageError("memory, context and batch are above 0.")
    for number, row in enumerate(rows, 1):
        if row["model"] in (None, ""):
            raise DataError(f"row {number} names no model.")
    _check_alike(rows, paired)
    every = _candidates(rows, budget, metric, paired)
    found = [each for each in every if each.total <= budget.memory]
    if not found:
        least = min(every, key=lambda each: each.total)
        raise DataError(
            f"nothing measured fits {budget.memory:,} bytes. The least is {least.total:,}: {least.weights:,} of "
            f"weights and {least.cache:,} of cache ({budget.context:,} tokens, batch {budget.batch}), by "
            f"`{least.command}`. Allow more memory, or a shorter context."
        )
    return _ranked(found, high)


def _check_alike(rows: Table, paired: str) -> None:
    for name in JUDGED:
        values = {str(row.get(name)) for row in rows if row.get(name) is not None}
        if name != paired and len(values) > 1:
            raise UsageError(
                f"runs were judged on different data ({name}: {', '.join(sorted(values))}); choose with --where, or "
                f"pair them: --paired {name}."
            )


def _candidates(rows: Table, budget: Budget, metric: str, paired: str) -> list[Candidate]:
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        value = row.get(metric)
        if isinstance(value, int | float) and math.isfinite(value):
            groups.setdefault(tuple(str(row.get(name)) for name in IDENTITY), []).append(row)
    if not groups:
        raise DataError(f"no run has a number in {metric!r}.")
    levels = sorted({str(row.get(paired)) for runs in groups.values() for row in runs}) if paired else []
    shapes: dict[str, KVShape] = {}
    found = []
    for runs in groups.values():
        at = {str(row.get(paired)): float(row[metric]) for row in runs} if paired else {}
        if paired and len(at) < len(levels):
            continue
        values = tuple(at[level] for level in levels) if paired else tuple(float(row[metric]) for row in runs)
        first, model = runs[0], str(runs[0]["model"])
        if model not in shapes:
            shapes[model] = _shape(first, model)
        cache = kv_bytes(shapes[model], budget.context, budget.batch, first.get("kv"))
        options = {name: first.get(name) for name in IDENTITY}
        if len(calibrated := {row.get("data") for row in runs}) == 1:
            options["data"] = calibrated.pop()
        mean = math.fsum(values) / len(values)
        found.append(Candidate(options=options, weights=stored_bytes(first), cache=cache, quality=mean, values=values))
    if not found:
        raise DataError(f"no candidate was measured at all {len(levels)} values of {paired}.")
    return found


def _shape(row: Mapping[str, Any], model: str) -> KVShape:
    """Of columns ``layers``, ``kv_heads`` and ``head_dim``, or of the model's config."""
    said = [row.get(name) for name in SHAPE]
    if any(value is not None for value in said):
        if not all(isinstance(value, int) and value > 0 for value in said):
            raise DataError(f"{model}: layers, kv_heads and head_dim are whole numbers above 0; got {said}.")
        return KVShape(heads=int(said[1] or 0), width=int(said[2] or 0), windows=(None,) * int(said[0] or 0))
    try:
        config = config_of(model)
    except (FileError, ModelError) as error:
        raise type(error)(f"{error} Or say the size of its cache in columns {', '.join(SHAPE)}.") from error
    return shape_of(config, model)


def _ranked(found: list[Candidate], high: bool) -> list[Candidate]:
    """By quality, with intervals of repeats; paired ones are drawn together, as far as they are equally many."""
    from dataclasses import replace

    generator = np.random.Generator(np.random.PCG64(0))
    sign = -1.0 if high else 1.0
    drawn = np.empty((len(found), DRAWS))
    picks: dict[int, Any] = {}
    for i, each in enumerate(found):
        count = len(each.values)
        if count not in picks:
            picks[count] = generator.integers(count, size=(DRAWS, count))
        drawn[i] = np.asarray(each.values)[picks[count]].mean(1)
    repeated = any(len(each.values) > 1 for each in found)
    shares = np.bincount((sign * drawn).argmin(0), minlength=len(found)) / DRAWS
    ends = np.quantile(drawn, [(1 - SHARE) / 2, (1 + SHARE) / 2], axis=1)
    made = [
        replace(
            each, sure=float(shares[i]) if repeated else math.nan,
            **(dict(zip(("low", "high"), ends[:, i].tolist(), strict=True)) if len(each.values) > 1 else {}),
        )
        for i, each in enumerate(found)
    ]  # fmt: skip
    return sorted(made, key=lambda each: (sign * each.quality, each.total))


def read_memory(text: str) -> int:
    """Bytes of ``8GB`` (10^9), ``8GiB`` (2^30), ``500MB`` or a plain number.

    Raises:
        UsageError: it is none of these.
    """
    units = {"": 1, "b": 1}
    for i, letter in enumerate("kmgt", 1):
        units |= {f"{letter}b": 1000**i, letter: 1000**i, f"{letter}ib": 1024**i}
    number = text.strip().rstrip("".join({c for unit in units for c in unit} | set("KMGTIB")) + " ")
    unit = text.strip()[len(number) :].strip().lower()
    try:
        found = float(number) * units[unit]
    except (ValueError, KeyError):
        raise UsageError(f"memory is a number with a unit, as 8GB, 8GiB or 500MB; got {text!r}.") from None
    if not 0 < found < math.inf:
        raise UsageError(f"memory is above 0; got {text!r}.")
    return int(found)


def best_first(found: Sequence[Candidate], most: int) -> list[dict[str, Any]]:
    """As rows for people and JSON."""
    return [
        {
            **{name: value for name, value in each.options.items() if value is not None}, "weights_bytes": each.weights,
            "cache_bytes": each.cache, "total_bytes": each.total, "quality": each.quality, "low": each.low,
            "high": each.high, "sure": each.sure, "repeats": len(each.values), "command": each.command,
        }
        for each in found[:most]
    ]  # fmt: skip
