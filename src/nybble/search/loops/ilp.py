"""The best choice there is, as an integer linear program (HAWQ-V3, Yao et al. 2021, arXiv:2011.10680, section 3.4).

One 0-1 variable a group and format; HiGHS solves it, through ``scipy.optimize.milp``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nybble.core.errors import UsageError
from nybble.search.loops import Loop
from nybble.search.problem import Choice, Problem


@dataclass(frozen=True, kw_only=True)
class Ilp(Loop):
    """Exact: no other choice within the limit has a smaller sum of losses."""

    def solve(self, problem: Problem) -> Choice:  # noqa: D102
        problem.check()
        losses = problem.losses.double().numpy()
        losses = losses - losses.min(1, keepdims=True)
        unit, slack = losses.max(), 0
        while True:
            choice = _solved(problem, losses / (unit or 1.0), problem.limit - slack)
            if choice is None:  # HiGHS gives up where sums differ from a limit in the last bits
                slack = max(2 * slack, 1)
                continue
            over = problem.cost(choice) - problem.limit
            lost = sum(row[item] for row, item in zip(losses, choice, strict=True))
            if over > 0:  # HiGHS holds a limit nearly, we to the byte
                slack = max(2 * slack, over)
            elif lost < unit / 1000:  # HiGHS stops a millionth of a unit above the best
                unit = lost
            else:
                return choice


def _solved(problem: Problem, losses: Any, limit: int) -> Choice | None:
    """HiGHS's answer, None without one; ``losses``: [groups, menu] in units of its own."""
    milp, constraint, matrices = _scipy()
    groups, menu = losses.shape
    if limit <= problem.least:
        return tuple(_cheapest(problem, group) for group in range(groups))
    # Differences to each group's cheapest format in millionths of what is left to spend: HiGHS takes sums that exceed
    # a limit by a millionth.
    spare = limit - problem.least
    extra = [1e6 * ((cost - min(row)) / spare) for row in problem.costs for cost in row]
    one = matrices.kron(matrices.eye(groups), np.ones((1, menu)))
    found = milp(
        1e3 * losses.ravel(),
        constraints=[constraint(one, 1, 1), constraint(np.array([extra]), -np.inf, 1e6)],
        integrality=np.ones(groups * menu),
        bounds=(0, 1),
        options={"mip_rel_gap": 1e-9},
    )
    return None if found.x is None else tuple(int(item) for item in found.x.reshape(groups, menu).argmax(1))


def _cheapest(problem: Problem, group: int) -> int:
    """The number of a group's cheapest format; of equals the one that loses least."""
    losses = problem.losses[group].tolist()
    return min(range(len(losses)), key=lambda item: (problem.costs[group][item], losses[item]))


def _scipy() -> tuple[Any, Any, Any]:
    try:
        from scipy import sparse
        from scipy.optimize import LinearConstraint, milp
    except ImportError as error:
        raise UsageError(
            "the loop 'ilp' needs SciPy: pip install 'nybble[search]'; the loop 'greedy' doesn't."
        ) from error
    return milp, LinearConstraint, sparse


PART = Ilp
