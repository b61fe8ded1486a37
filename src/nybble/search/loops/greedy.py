"""From every group's best format downwards, each time where a unit of cost is given up for the smallest loss.

What is left of the budget in the end is spent again, where it gains most. Near the best choice, and without SciPy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nybble.search.loops import Loop
from nybble.search.problem import Choice, Problem


@dataclass(frozen=True, kw_only=True)
class Greedy(Loop):
    """Steps may leave formats of a menu out: from 8 bits to 3 where 4 would lose as much."""

    def solve(self, problem: Problem) -> Choice:  # noqa: D102
        problem.check()
        losses = problem.losses.tolist()
        choice = [min(range(len(row)), key=lambda item: (row[item], -item)) for row in losses]
        spent = problem.cost(choice)
        while spent > problem.limit:
            cheaper = [move for move in _moves(problem, losses, choice) if move[0] < 0]
            cost, _, group, item = min(cheaper, key=lambda move: (move[1] / -move[0], *move[1:]))
            choice[group], spent = item, spent + cost
        while True:
            better = [
                move for move in _moves(problem, losses, choice) if move[0] <= problem.limit - spent and move[1] < 0
            ]
            if not better:
                return tuple(choice)
            cost, _, group, item = min(better, key=lambda move: (move[1], move[0], *move[2:]))
            choice[group], spent = item, spent + cost


def _moves(problem: Problem, losses: list[list[float]], choice: list[int]) -> Iterator[tuple[int, float, int, int]]:
    """What each change of one group adds to cost and loss; the group, and the format."""
    for group, now in enumerate(choice):
        for item, cost in enumerate(problem.costs[group]):
            if item != now:
                yield cost - problem.costs[group][now], losses[group][item] - losses[group][now], group, item


PART = Greedy
