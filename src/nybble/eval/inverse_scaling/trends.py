"""Summaries of a task's rows, two models compared row by row, and the shape of a metric over sizes or bits.

Source of the metrics: arXiv 2306.09479. It labels trends by eye; the rule here is ours: an interior point is a valley
where it lies below both ends by more than ``z`` combined standard errors, a summit likewise above; without either the
ends decide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nybble.core.errors import UsageError
from nybble.core.seeds import generator
from nybble.eval.inverse_scaling.examples import Questions

INVERSE, POSITIVE, U, INVERTED_U, FLAT = "inverse", "positive", "U-shaped", "inverted-U", "flat"
Z = 2.0
TINY = 1e-12
"""The least standard error: answers that are all alike have none."""
COLLAPSED = 0.01
"""Coverage below it: the model hardly knows that it is asked; damage, not a trend."""
DRAWS = 1000


def summary(asked: Questions, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means of each metric over the rows, with standard errors (``_se``; not of one row), and chance where known."""
    found: dict[str, float] = {}

    def told(name: str, values: Sequence[float]) -> None:
        numbers = torch.tensor(values, dtype=torch.float64)
        found[name] = float(numbers.mean())
        if len(numbers) > 1:
            found[f"{name}_se"] = float(numbers.std() / math.sqrt(len(numbers)))

    if asked.kind == "logodds":
        told("logodds", [row["logodds"] for row in rows])
        told("absolute_logodds", [abs(row["logodds"]) for row in rows])
        told("acc", [float(row["correct"]) for row in rows])
    else:
        told("loss", [row["loss"] for row in rows])
    if asked.kind == "classification":
        told("acc", [float(row["correct"]) for row in rows])
        told("acc_norm", [float(row["correct_norm"]) for row in rows])
        counts = [len(row.answers) for row in asked.rows]
        found["loss_chance"] = sum(math.log(n) for n in counts) / len(counts)
        found["acc_chance"] = sum(1 / n for n in counts) / len(counts)
    found["coverage"] = sum(row["coverage"] for row in rows) / len(rows)
    return found


def paired(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What changed from one model to another, row by row.

    Returns:
        ``loss_change`` with ``loss_change_se``, ``coverage_change``, and of answers ``flips`` (the share of rows whose
        correctness changed), ``lost`` and ``won`` (counts), ``mcnemar_p`` (exact, two-sided: that losses and gains are
        equally likely).

    Raises:
        UsageError: of other questions.
    """
    if len(before) != len(after):
        raise UsageError(f"rows of different questions: {len(before)} and {len(after)}.")
    found: dict[str, float] = {}
    key = "loss" if "loss" in before[0] else "logodds"
    change = torch.tensor([b[key] - a[key] for a, b in zip(before, after, strict=True)], dtype=torch.float64)
    found[f"{key}_change"] = float(change.mean())
    if len(change) > 1:
        found[f"{key}_change_se"] = float(change.std() / math.sqrt(len(change)))
    found["coverage_change"] = sum(b["coverage"] - a["coverage"] for a, b in zip(before, after, strict=True)) / len(
        change
    )
    if "correct" in before[0]:
        pairs = [(bool(a["correct"]), bool(b["correct"])) for a, b in zip(before, after, strict=True)]
        lost, won = pairs.count((True, False)), pairs.count((False, True))
        found |= {"flips": (lost + won) / len(pairs), "lost": lost, "won": won, "mcnemar_p": mcnemar(lost, won)}
    return found


def mcnemar(lost: int, won: int) -> float:
    """The exact two-sided p value of ``lost`` changes one way and ``won`` the other, if both were equally likely."""
    total, least = lost + won, min(lost, won)
    tail = sum(math.exp(_log_choose(total, k) - total * math.log(2)) for k in range(least + 1))
    return min(1.0, 2 * tail)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def trend(goodness: Sequence[float], errors: Sequence[float], z: float = Z) -> dict[str, Any]:
    """The shape of a metric of which more is better, over models in the order of their size (or of their bits).

    Args:
        goodness: accuracy, or minus the loss, of each.
        errors: their standard errors.
        z: of "more than".

    Returns:
        ``label``: inverse, positive, U-shaped, inverted-U or flat; ``ends``: the last's difference to the first in
        standard errors; ``valley``, ``summit``: how far the deepest interior point lies below, the highest above, the
        nearer of both ends, in standard errors, 0 without one; ``z``.

    Raises:
        UsageError: fewer than two points, or not as many errors.
    """
    if len(goodness) < 2 or len(goodness) != len(errors):
        raise UsageError(
            f"a trend takes two or more points, and an error of each; got {len(goodness)} and {len(errors)}."
        )

    def apart(i: int, j: int) -> float:
        return (goodness[i] - goodness[j]) / max(math.hypot(errors[i], errors[j]), TINY)

    last = len(goodness) - 1
    inside = range(1, last)
    valley = max((min(apart(0, i), apart(last, i)) for i in inside), default=0.0)
    summit = max((min(apart(i, 0), apart(i, last)) for i in inside), default=0.0)
    ends = apart(last, 0)
    if max(valley, summit) > z:
        label = U if valley >= summit else INVERTED_U
    else:
        label = POSITIVE if ends > z else INVERSE if ends < -z else FLAT
    return {"label": label, "ends": ends, "valley": valley, "summit": summit, "z": z}


def rank_correlation(sizes: Sequence[float], goodness: Tensor, seed: int = 0, draws: int = DRAWS) -> dict[str, float]:
    """Spearman's correlation of size and goodness, with an interval from drawing questions anew.

    Args:
        sizes: of each model.
        goodness: [models, questions], of each question, the same for all models.
        seed: of the draws, each of which takes the same questions for all models.
        draws: how many.

    Returns:
        ``rho``, and its 2.5 and 97.5 per cent points ``low`` and ``high``.

    Raises:
        UsageError: fewer than two models, or models of one size.
    """
    if len(sizes) < 2 or len(set(sizes)) < 2 or len(sizes) != len(goodness):
        raise UsageError("a correlation takes models of two or more sizes, each with its questions.")
    values, count = goodness.double(), goodness.shape[1]
    order = _ranks(torch.tensor(sizes, dtype=torch.float64)[None])
    chance = generator(seed, "inverse scaling", "questions")
    picks = torch.randint(count, (draws, count), generator=chance)
    drawn = torch.stack([values[:, pick].mean(1) for pick in picks])
    spread = _correlation(order, _ranks(drawn))
    low, high = torch.quantile(spread, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"rho": float(_correlation(order, _ranks(values.mean(1)[None]))), "low": low, "high": high}


def _ranks(values: Tensor) -> Tensor:
    """Ranks in each row, ties at their mean: float64 like ``values``."""
    less = (values[:, None, :] < values[:, :, None]).sum(-1).double()
    same = (values[:, None, :] == values[:, :, None]).sum(-1).double()
    return less + (same - 1) / 2


def _correlation(left: Tensor, right: Tensor) -> Tensor:
    left, right = left - left.mean(1, keepdim=True), right - right.mean(1, keepdim=True)
    scale = (left.square().sum(1) * right.square().sum(1)).sqrt()
    return torch.where(scale > 0, (left * right).sum(1) / scale.clamp_min(1e-300), 0.0)
