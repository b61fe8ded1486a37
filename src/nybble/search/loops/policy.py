"""A policy that draws choices, and moves towards those that are rewarded (FLIQS, Dotzel et al. 2023, arXiv:2308.03290).

Of given losses (sensitivities) it is here beside the exact loop: a search that trains
(:mod:`nybble.pipelines.search_training`) has the same policy, and the training's own losses. A choice is rewarded with
minus its loss, in units of what lies between the least and the most that could be lost, at its cost over the limit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from nybble.core.options import at_least_one
from nybble.core.seeds import generator
from nybble.search.loops import Loop
from nybble.search.problem import Choice, Problem
from nybble.training.policy import Policy, PolicyOptions


@dataclass(frozen=True, kw_only=True)
class PolicyLoop(PolicyOptions, Loop):
    """Each group's most probable format in the end, and cheaper ones where that is above the limit.

    Attributes:
        steps: choices that are drawn, where nothing trains.
        seed: of the draws.
    """

    steps: int = 1000
    seed: int = 0
    near: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(steps=self.steps)

    def solve(self, problem: Problem) -> Choice:  # noqa: D102
        problem.check()
        order = sorted(range(len(problem.names)), key=lambda group: problem.names[group])  # whose place decides nothing
        chosen = self._solved(
            replace(
                problem, names=[problem.names[i] for i in order], losses=problem.losses[order],
                costs=[problem.costs[i] for i in order],
            )
        )  # fmt: skip
        return tuple(item for _, item in sorted(zip(order, chosen, strict=True)))

    def _solved(self, problem: Problem) -> Choice:
        losses = problem.losses - problem.losses.min(1, keepdim=True).values
        rows = (losses / (float(losses.max(1).values.sum()) or 1.0)).tolist()

        def loss(choice: Choice) -> float:
            return float(sum(row[item] for row, item in zip(rows, choice, strict=True)))

        return self.searched(problem, loss).within(problem.costs, problem.limit)

    def searched(self, problem: Problem, loss: Callable[[Choice], float]) -> Policy:
        """The policy behind all steps; ``loss`` of a choice may be noisy."""
        policy, limit = Policy([len(row) for row in problem.costs], self), max(1, problem.limit)
        drawn = generator(self.seed, "policy")
        for step in range(self.steps):
            progress = step / max(1, self.steps - 1)
            if progress >= self.settle < 1:
                break
            choice = policy.sample(drawn, progress)
            policy.update(self.rewarded(self.quality(loss(choice)), problem.cost(choice) / limit), progress)
        return policy


PART = PolicyLoop
