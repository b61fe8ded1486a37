"""One level lower at a time, where much is spent and little is lost: DyBit's hardware-aware search.

All groups begin with their dearest format. Groups are ranked twice, by what they cost now (most first) and by what the
next level loses (least first); the one with the smallest sum of ranks steps down. That is repeated until the limit is
kept, a speed-up in the paper's words; or, with ``beta``, as long as the sum of losses stays within ``beta`` times the
one at the start, an error constraint. The steps don't depend on the limit, so a tighter one never raises a format.

Zhou et al. 2023, arXiv:2302.12510, as far as it is known here: a reconstruction; how both ranks become one is ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from nybble.core.errors import UsageError
from nybble.search.loops import Loop
from nybble.search.problem import Choice, Problem


@dataclass(frozen=True, kw_only=True)
class Levels(Loop):
    """A level lower is fewer bits of one side, the next there are in the menu; of a menu without sides less cost.

    Attributes:
        beta: how many times the losses at the start the end may have, 1 or more; 0: no such constraint.
    """

    beta: float = 0.0
    near: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.beta and not 1 <= self.beta < float("inf"):
            raise UsageError(f"beta is {self.beta:g}; it is how many times the error may grow, from 1; or 0, for none.")

    def solve(self, problem: Problem) -> Choice:  # noqa: D102
        problem.check()
        choice = [
            max(range(len(costs)), key=lambda item: (costs[item], -losses[item]))
            for costs, losses in zip(problem.costs, problem.losses.tolist(), strict=True)
        ]
        most = self.beta * problem.loss(choice)
        while self.beta or problem.cost(choice) > problem.limit:
            step = _step(problem, choice, most - problem.loss(choice) if self.beta else float("inf"))
            if step is None:
                break
            choice[step[0]] = step[1]
        if problem.cost(choice) > problem.limit:
            raise UsageError(
                f"a budget of {problem.limit:,} {problem.unit} is infeasible with these levels"
                f"{f' and beta={self.beta:g}' if self.beta else ''}; the least they come to is "
                f"{problem.cost(choice):,}. Raise {'one of both' if self.beta else 'it, or add a smaller format'}."
            )
        return tuple(choice)


def _step(problem: Problem, choice: Sequence[int], spare: float) -> tuple[int, int] | None:
    """The group that steps down, and to which format; None: nothing can."""
    losses, moves = problem.losses.tolist(), []
    for group, now in enumerate(choice):
        steps = [(losses[group][to] - losses[group][now], to) for to in _lower(problem, group, now)]
        if possible := [step for step in steps if step[0] <= spare]:
            moves.append((group, *min(possible)))
    if not moves:
        return None
    costs = {group: problem.costs[group][choice[group]] for group, _, _ in moves}
    name = problem.names
    dear = sorted(moves, key=lambda move: (-costs[move[0]], name[move[0]]))
    cheap = sorted(moves, key=lambda move: (move[1], name[move[0]]))
    ranks = {move[0]: dear.index(move) + cheap.index(move) for move in moves}
    group, _, to = min(moves, key=lambda move: (ranks[move[0]], move[1], name[move[0]]))
    return group, to


def _lower(problem: Problem, group: int, now: int) -> Iterator[int]:
    """Formats one level below; what has fewer bits may cost the same."""
    costs = problem.costs[group]
    if not problem.bits:
        cheaper = [item for item, cost in enumerate(costs) if cost < costs[now]]
        dearest = max((costs[item] for item in cheaper), default=0)
        yield from (item for item in cheaper if costs[item] == dearest)
        return
    below = [item for item, bits in enumerate(problem.bits) if _under(bits, problem.bits[now])]
    yield from (item for item in below if not any(_under(problem.bits[item], problem.bits[k]) for k in below))


def _under(bits: Sequence[int], others: Sequence[int]) -> bool:
    """Whether no side has more, and one less."""
    return bits != others and all(b <= other for b, other in zip(bits, others, strict=True))


PART = Levels
