"""What a training law says of a plan: the penalty of its format, other layouts, when more data harm, the best width."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nybble.core.errors import UsageError
from nybble.lab.laws.fit import interval
from nybble.lab.laws.training import Block, TrainingLaw

PUBLISHED_RANGE = ((41e6, 70e9), (1e10, 1e11))
"""Weights and tokens that the published law was fitted to or checked on."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A training: weights of the linear layers, tokens, elements that share a scale, and what may be left open.

    Attributes:
        N, D, block: of the law. layout: exponent and mantissa bits. bits: of formats to compare, a sign among them.
        compute: FLOPs, of which N, D and the width follow where they are left open.
    """

    N: float | None = None
    D: float | None = None
    block: Block = 128
    layout: tuple[int, int] | None = None
    bits: int | None = None
    compute: float | None = None


def forecast(laws: Sequence[TrainingLaw], plan: Plan) -> dict[str, Any]:
    """Predictions, each ``value``, ``low``, ``high``.

    Args:
        laws: the law, and those of bootstrap draws, which make the intervals.
        plan: what is asked of it.

    Returns:
        Of the plan's N and D ``loss`` and ``bf16``; with a layout ``penalty``, ``critical_data`` and ``harmful``,
        whether D is past it; with bits ``layouts``, the best first; with D ``best_bits``; with a compute
        ``best_of_compute`` (all free) or, with N, ``best_bits_of_compute``.

    Raises:
        UsageError: nothing is asked, a size that can't be, or a format without the sizes that its penalty is of.
    """
    N, D, block = plan.N, plan.D, plan.block
    if plan.layout is not None and N is None:
        raise UsageError("what a format costs depends on the size: give --parameters, and --tokens, or leave it out.")
    if plan.bits is not None and (N is None or D is None):
        raise UsageError("--bits compares penalties: give --parameters and --tokens.")
    found: dict[str, Any] = {}
    if N is not None and D is not None:
        found["bf16"] = _of(laws, lambda law: law.loss(N, D))
        if plan.layout is not None:
            found |= _of_format(laws, N, D, plan.layout, block)
        if plan.bits is not None:
            found["layouts"] = [_of_layout(laws, N, D, pair, block) for pair in laws[0].layouts(plan.bits)]
    elif N is not None and plan.layout is not None:
        found["critical_data"] = _of(laws, lambda law: law.critical_data(N, *_pair(plan), block))
    if D is not None:
        found["best_bits"] = _of(laws, lambda law: law.bits_for_data(D, block))
    if (compute := plan.compute) is not None:
        if N is not None:
            found["best_bits_of_compute"] = _of(laws, lambda law: law.bits_for_size(N, compute, block))
        else:
            best = [law.best_of_compute(compute, block) for law in laws]
            found["best_of_compute"] = {
                name: _interval([row[i] for row in best]) for i, name in enumerate(("bits", "N", "D"))
            }
    if not found:
        raise UsageError("say what is planned: --parameters with --tokens or --format, --tokens, or --compute.")
    return found


def warnings_of(plan: Plan, found: dict[str, Any], published: bool) -> list[str]:
    """What a person should know before believing it; ``published``: whether it is of the published law."""
    said = []
    if found.get("harmful"):
        most = found["critical_data"]["value"]
        said.append(f"past {most:.3g} tokens more of them raise the loss in this format; {plan.D:.3g} are planned.")
    free = found.get("best_of_compute", {})
    sizes = [free[name]["value"] if value is None and free else value for name, value in (("N", plan.N), ("D", plan.D))]
    for name, value, (low, high) in zip(("N", "D"), sizes, PUBLISHED_RANGE, strict=True):
        if published and value is not None and not low <= value <= high:
            said.append(
                f"{name} = {value:.3g} is outside of {low:.3g} to {high:.3g}, where the published law was seen."
            )
    return said


def _of_layout(laws: Sequence[TrainingLaw], N: float, D: float, pair: tuple[int, int], block: Block) -> dict[str, Any]:
    return {"format": f"E{pair[0]}M{pair[1]}", **_of(laws, lambda law: law.penalty(N, D, *pair, block))}


def _of_format(laws: Sequence[TrainingLaw], N: float, D: float, pair: tuple[int, int], block: Block) -> dict[str, Any]:
    critical = _of(laws, lambda law: law.critical_data(N, *pair, block))
    return {
        "loss": _of(laws, lambda law: law.loss(N, D, *pair, block)),
        "penalty": _of(laws, lambda law: law.penalty(N, D, *pair, block)),
        "critical_data": critical, "harmful": critical["value"] < D,
    }  # fmt: skip


def _pair(plan: Plan) -> tuple[int, int]:
    assert plan.layout is not None
    return plan.layout


def _of(laws: Sequence[TrainingLaw], what: Callable[[TrainingLaw], float]) -> dict[str, Any]:
    return _interval([what(law) for law in laws])


def _interval(values: Sequence[float]) -> dict[str, Any]:
    low, high = interval(values[1:])
    return {"value": values[0], "low": None if math.isnan(low) else low, "high": None if math.isnan(high) else high}
