"""More bits for whatever is sharper: HAWQ's assignment along one order (Dong et al. 2019, arXiv:1905.03696, section 3).

Groups are sorted by sharpness, ``S_i = lambda_i / n_i``, and no group has a dearer format than a sharper one. The paper
leaves the numbers to the hand; of all assignments along the order that keep the limit this takes the one whose sum of
losses is smallest. They are as many as there are places for the borders between formats, and all are looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from nybble.core.errors import UsageError
from nybble.search.loops import Loop
from nybble.search.problem import Choice, Problem

MOST = 20_000_000
"""Assignments that are looked at."""


@dataclass(frozen=True, kw_only=True)
class Monotone(Loop):
    """Of groups whose sharpness wasn't measured the largest loss stands for it."""

    near: ClassVar[bool] = False

    def solve(self, problem: Problem) -> Choice:  # noqa: D102
        problem.check()
        groups, menu = problem.losses.shape
        if math.comb(groups + menu - 1, menu - 1) > MOST:
            raise UsageError(
                f"the loop 'monotone' looks at all borders between {menu} formats in {groups} groups, which are too "
                "many; give a shorter menu, or take a method of the loop 'ilp'."
            )
        sharp = problem.sharpness or problem.losses.max(1).values.tolist()
        order = sorted(range(groups), key=lambda group: (-sharp[group], problem.names[group]))
        costs, losses = np.array(problem.costs, np.float64), problem.losses.numpy()
        dearest_first = np.argsort(-costs.sum(0), kind="stable")
        found = _best(costs[order][:, dearest_first], losses[order][:, dearest_first], float(problem.limit))
        if found is None:
            raise UsageError(
                f"a budget of {problem.limit:,} {problem.unit} is infeasible along one order of the groups; raise it."
            )
        choice = [0] * groups
        for place, group in enumerate(order):
            choice[group] = int(dearest_first[sum(place >= border for border in found)])
        return tuple(choice)


def _best(costs: np.ndarray, losses: np.ndarray, limit: float) -> tuple[int, ...] | None:
    """Borders in ascending order: groups from one to the next have a format of the menu, [groups, menu] dearest first.

    The last border is found for all its places at once.
    """
    groups, menu = costs.shape
    spent, lost = (np.vstack([np.zeros(menu), each.cumsum(0)]) for each in (costs, losses))
    best: tuple[float, tuple[int, ...]] | None = None
    if menu == 1:
        return () if spent[-1, 0] <= limit else None
    for borders in _borders(groups, menu - 2):
        start, places = (borders[-1] if borders else 0), np.arange(borders[-1] if borders else 0, groups + 1)
        edges = (0, *borders)
        ahead = [sum(each[b, i] - each[a, i] for i, (a, b) in enumerate(zip(edges, borders, strict=False)))
                 for each in (spent, lost)]  # fmt: skip
        cost, loss = (
            before + (each[places, menu - 2] - each[start, menu - 2]) + (each[-1, menu - 1] - each[places, menu - 1])
            for before, each in zip(ahead, (spent, lost), strict=True)
        )
        loss = np.where(cost <= limit, loss, np.inf)
        at = int(loss.argmin())
        if math.isfinite(loss[at]) and (best is None or loss[at] < best[0]):
            best = float(loss[at]), (*borders, int(places[at]))
    return None if best is None else best[1]


def _borders(groups: int, count: int, start: int = 0) -> Iterator[tuple[int, ...]]:
    """All ascending places of so many borders."""
    if not count:
        yield ()
        return
    for first in range(start, groups + 1):
        for rest in _borders(groups, count - 1, first):
            yield (first, *rest)


PART = Monotone
