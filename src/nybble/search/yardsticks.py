"""What a search's answer is compared with: choices that cost the same and know nothing, or the wrong thing."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import torch

from nybble.core.errors import UsageError
from nybble.core.seeds import generator
from nybble.search.loops import Loop
from nybble.search.problem import Choice, Problem


def at_random(problem: Problem, seed: int, number: int) -> Choice:
    """A choice drawn without looking at losses, and brought as near to the limit as single changes bring it.

    Every group draws a format; then groups in random order are made cheaper until the limit holds, and dearer as long
    as it does.

    Args:
        problem: with a limit that can be met.
        seed: of the search.
        number: of the draw.
    """
    drawn = generator(seed, "random assignment", str(number))
    groups, menu = problem.losses.shape
    choice = [int(torch.randint(menu, (1,), generator=drawn)) for _ in range(groups)]
    spent = problem.cost(choice)
    for dearer in (False, True):
        while True:
            moves = []
            for group, item in enumerate(choice):
                changes = [cost - problem.costs[group][item] for cost in problem.costs[group]]
                steps = [
                    (c, to) for to, c in enumerate(changes) if (0 < c <= problem.limit - spent if dearer else c < 0)
                ]
                moves += [(group, *(min(steps) if dearer else max(steps)))] if steps else []
            if not moves or (not dearer and spent <= problem.limit):
                break
            group, change, item = moves[int(torch.randint(len(moves), (1,), generator=drawn))]
            choice[group], spent = item, spent + change
    return tuple(choice)


def reversed_order(problem: Problem, loop: Loop, elements: list[int]) -> Choice:
    """The loop's choice with sensitivities turned round: the most sensitive group is told the least sensitive's losses.

    Args:
        problem: the true one.
        loop: that solves it.
        elements: weights of each group; losses are exchanged per weight.
    """
    sizes = torch.tensor(elements, dtype=torch.float64)[:, None]
    each = problem.losses / sizes
    order = each.max(1).values.argsort(stable=True)
    turned = torch.empty_like(each)
    turned[order] = each[order.flip(0)]
    return loop.solve(replace(problem, losses=turned * sizes, sharpness=[-each for each in problem.sharpness]))


def uniform(problem: Problem, menu: int) -> list[Choice]:
    """Every format for all groups, as far as the limit allows, and the dearer ones too: they are rows of a table."""
    return [(item,) * len(problem.costs) for item in range(menu)]


def front(problem: Problem, loop: Loop, points: int) -> list[tuple[int, float, Choice]]:
    """Cost, expected loss and choice at budgets from the least to the most: the Pareto front as the loop finds it.

    Args:
        problem: its limit doesn't matter.
        loop: that solves it.
        points: how many budgets, at least two.
    """
    span, found = problem.most - problem.least, []
    for point in range(points):
        with suppress(UsageError):  # a loop with a constraint of its own doesn't come to each of them
            choice = loop.solve(replace(problem, limit=problem.least + span * point // (points - 1)))
            found.append((problem.cost(choice), problem.loss(choice), choice))
    return [each for i, each in enumerate(found) if each[2] not in [other[2] for other in found[:i]]]
