"""Fits as pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from nybble.lab.curves import Curve, Point, curves
from nybble.lab.laws.bit_level import Families
from nybble.lab.laws.fit import Fit
from nybble.lab.laws.trainings import Array, Trainings
from nybble.lab.plot import plot


def draw_fit(runs: Trainings, found: Fit, path: Path) -> None:
    """Draw fitted against measured losses: a curve a format, and the line on which they would lie.

    Raises:
        UsageError: matplotlib is missing or can't write such a file. FileError: it can't be written.
    """
    law = found.training_laws()[0]
    plain = law.n / runs.N**law.alpha + law.d / runs.D**law.beta + law.eps
    share = runs.D**law.beta / runs.N**law.alpha * runs.log2_block
    fine = law.gamma * (runs.E + 0.5) ** law.delta * (runs.M + 0.5) ** law.nu
    predicted = np.where(runs.wide, plain, plain + share / fine)
    names = np.array([_name(e, m) for e, m in zip(runs.E, runs.M, strict=True)])
    ends = np.array([runs.loss.min(), runs.loss.max()])
    drawn = [_curve("measured = fitted", ends, ends)]
    drawn += [
        _curve(name, runs.loss[names == name], predicted[names == name]) for name in dict.fromkeys(names.tolist())
    ]
    plot(drawn, path, x="measured loss, nats a token", y="fitted loss", title=f"{len(runs)} trainings")


def _name(exponent: float, mantissa: float) -> str:
    return "bf16" if np.isnan(exponent) else f"E{exponent:.0f}M{mantissa:.0f}"


def _curve(name: str, x: Array, y: Array) -> Curve:
    places = sorted(zip(x.tolist(), y.tolist(), strict=True))
    return Curve(name=name, points=tuple(Point(x=a, mean=b, low=b, high=b, count=1) for a, b in places))


def draw_bit_level(found: Families, path: Path, *, y: str) -> None:
    """Draw y against total bits: a curve a family and series, with the interval of repeats.

    Raises:
        UsageError: matplotlib is missing or can't write such a file. FileError: it can't be written.
    """
    rows = [
        {"bits": 2.0**cell.log2_bits, y: value, "series": f"{family} {series}".strip()}
        for family, cells in found.items() for series, points in cells.items()
        for cell in points for value in cell.values
    ]  # fmt: skip
    drawn = [replace(curve, name=curve.name.removeprefix("series ")) for curve in curves(rows, "bits", y, ["series"])]
    plot(drawn, path, x="total bits of the model", y=y, title="bit-level scaling", log=["x"])
