"""Fits of training laws to runs: robust least squares on log losses, several starts, bootstrapped intervals.

Three laws of what a format costs, over the same law of high precision: ``floating`` (exponent and mantissa bits have
powers of their own, Sun et al. 2025), ``width`` (a power of E + M + 1 alone) and ``constant`` (the same whatever the
format: the null).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nybble.core.errors import DataError, UsageError
from nybble.lab.laws.training import PUBLISHED, TrainingLaw
from nybble.lab.laws.trainings import Array, Trainings, check_enough

HUBER = 0.01
"""Residuals of log losses beyond which a training counts as an outlier (Huber)."""
SHARE, FOLDS, REFINED = 0.95, 5, 4
_FAR = 1e3
BASE = ("n", "alpha", "d", "beta", "eps")


def _of_sizes(t: Array, r: Trainings) -> Array:
    found: Array = r.D ** t[3] / r.N ** t[1] * r.log2_block
    return found


def _floating(t: Array, r: Trainings) -> Array:
    fine = t[5] * (r.E + 0.5) ** t[6] * (r.M + 0.5) ** t[7]
    found: Array = _of_sizes(t, r) / fine
    return found


def _width(t: Array, r: Trainings) -> Array:
    found: Array = _of_sizes(t, r) / (t[5] * (r.E + r.M + 1) ** t[6])
    return found


def _constant(t: Array, r: Trainings) -> Array:
    return np.full(len(r), t[5])


@dataclass(frozen=True)
class Penalty:
    """``names`` of a law's own constants, the penalty, and guesses of its exponents to start from."""

    names: tuple[str, ...]
    of: Callable[[Array, Trainings], Array]
    guesses: tuple[tuple[float, ...], ...]


LAWS: Mapping[str, Penalty] = {
    "floating": Penalty(("gamma", "delta", "nu"), _floating, ((3.0, 3.0), (1.5, 1.5), (4.0, 2.0), (2.0, 4.0))),
    "width": Penalty(("gamma", "delta"), _width, ((6.0,), (3.0,))),
    "constant": Penalty(("rho",), _constant, ((),)),
}


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A fitted law.

    Attributes:
        law: its name in :data:`LAWS`. constants: name -> value. draws: [draws, constants], of the bootstrap.
        rms: root mean square of the residuals of log losses. held_out: of trainings that a fit didn't see, 5-fold.
        runs: how many.
    """

    law: str
    constants: Mapping[str, float]
    draws: Array
    rms: float
    held_out: float
    runs: int

    def interval(self, name: str) -> tuple[float, float]:
        """The percentile interval (95 %) of a constant; NaN without draws."""
        return interval(self.draws[:, list(self.constants).index(name)])

    def training_laws(self) -> list[TrainingLaw]:
        """The floating law, and one a draw behind it, for intervals of whatever it predicts."""
        if self.law != "floating":
            raise UsageError(f"predictions are of the floating law; this is {self.law}.")
        every = [list(self.constants.values()), *self.draws.tolist()]
        return [TrainingLaw(**dict(zip(self.constants, values, strict=True))) for values in every]


def interval(values: Any) -> tuple[float, float]:
    """The middle 95 %."""
    if not len(values):
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return float(low), float(high)


def fit(runs: Trainings, law: str = "floating", *, draws: int = 200, seed: int = 0) -> Fit:
    """Fit a law.

    Where a training has a twin in high precision, the penalty is fitted to the difference of the two, in which what
    they share (the data's order, the first weights) cancels.

    Args:
        runs: trainings, those in high precision among them.
        law: ``floating``, ``width`` or ``constant``.
        draws: of the bootstrap over trainings; each is fitted from where the fit is.
        seed: of the draws and the folds.

    Raises:
        DataError: too few trainings, or one value on an axis. UsageError: SciPy is missing.
    """
    if law not in LAWS:
        raise UsageError(f"a law is {', '.join(LAWS)}; got {law!r}.")
    penalty = LAWS[law]
    check_enough(runs, len(BASE) + len(penalty.names))
    least_squares = _scipy()
    starts = [(float((_residuals(s, runs, penalty) ** 2).sum()), i, s) for i, s in enumerate(_starts(runs, penalty))]
    tried = [_refined(least_squares, s, runs, penalty) for _, _, s in sorted(starts)[:REFINED]]
    cost, theta = min(tried, key=lambda found: found[0])
    if not math.isfinite(cost):
        raise DataError(f"no {law} law could be fitted to these {len(runs)} trainings.")
    generator = np.random.Generator(np.random.PCG64(seed))
    drawn = [
        _refined(least_squares, theta, runs.at(generator.integers(len(runs), size=len(runs))), penalty)[1]
        for _ in range(draws)
    ]
    seen = _residuals(theta, runs, penalty)
    return Fit(
        law=law, constants=dict(zip((*BASE, *penalty.names), np.exp(theta).tolist(), strict=True)),
        draws=np.exp(np.array(drawn)).reshape(draws, len(theta)), rms=_rms(seen),
        held_out=_held_out(least_squares, theta, runs, penalty, generator), runs=len(runs),
    )  # fmt: skip


def _residuals(theta: Array, runs: Trainings, penalty: Penalty) -> Array:
    """Of log losses; of a training with a twin, of what the format added, as a share of its loss."""
    t = np.exp(np.clip(theta, -50, 50))
    with np.errstate(all="ignore"):  # a step too far, which its residuals say
        plain = t[0] / runs.N ** t[1] + t[2] / runs.D ** t[3] + t[4]
        rho = np.where(runs.wide, 0.0, penalty.of(t, runs))
        alone = np.log(runs.loss) - np.log(plain + rho)
        both = (runs.loss - runs.twin - rho) / runs.loss
    found: Array = np.where(np.isnan(runs.twin), alone, both)
    return np.clip(np.nan_to_num(found, nan=_FAR), -_FAR, _FAR)


def _refined(least_squares: Any, start: Array, runs: Trainings, penalty: Penalty) -> tuple[float, Array]:
    found = least_squares(
        _residuals, start, args=(runs, penalty), jac="3-point", loss="huber", f_scale=HUBER, x_scale="jac",
        xtol=1e-13, ftol=1e-13, gtol=1e-13, max_nfev=300,
    )  # fmt: skip
    return float(found.cost), np.asarray(found.x, dtype=np.float64)


def _starts(runs: Trainings, penalty: Penalty) -> list[Array]:
    """Of guessed exponents and floor, with what is linear solved for."""
    base = runs.at(runs.wide) if len(set(runs.N[runs.wide])) > 1 and len(set(runs.D[runs.wide])) > 1 else runs
    found = []
    for alpha in (PUBLISHED.alpha, 0.4):
        for beta in (PUBLISHED.beta, 0.3):
            for share in (0.3, 0.6, 0.9):
                eps = share * float(base.loss.min())
                n, d = _positive_solution(base, alpha, beta, eps)
                plain = n / runs.N**alpha + d / runs.D**beta + eps
                left = np.where(np.isnan(runs.twin), runs.loss - plain, runs.loss - runs.twin)[~runs.wide]
                for guess in penalty.guesses:
                    t = np.array([n, alpha, d, beta, eps, 1.0, *guess])
                    unit = penalty.of(t, runs.at(~runs.wide))
                    scale = max(1e-9, float(np.median(left / unit)))  # how many times the unit the penalty is
                    t[5] = scale if penalty.names == ("rho",) else 1 / scale
                    found.append(np.log(t))
    return found


def _positive_solution(runs: Trainings, alpha: float, beta: float, eps: float) -> tuple[float, float]:
    """What ``n`` and ``d`` of the least squares are, kept above nothing."""
    columns = np.stack([runs.N**-alpha, runs.D**-beta], 1)
    sizes = columns.max(0)
    solved = np.linalg.lstsq(columns / sizes, runs.loss - eps, rcond=None)[0]
    n, d = (np.maximum(solved, 1e-3) / sizes).tolist()
    return float(n), float(d)


def _held_out(least_squares: Any, theta: Array, runs: Trainings, penalty: Penalty, generator: Any) -> float:
    """Each fold's residuals under a fit of the others."""
    order, found = generator.permutation(len(runs)), []
    for fold in range(FOLDS):
        out = np.zeros(len(runs), dtype=bool)
        out[order[fold::FOLDS]] = True
        found.append(_residuals(_refined(least_squares, theta, runs.at(~out), penalty)[1], runs.at(out), penalty))
    return _rms(np.concatenate(found))


def _rms(residuals: Array) -> float:
    return float(np.sqrt((residuals**2).mean()))


def _scipy() -> Any:
    try:
        from scipy.optimize import least_squares
    except ImportError as error:
        raise UsageError("fits need SciPy: pip install 'nybble[search]'; the published law doesn't.") from error
    return least_squares
