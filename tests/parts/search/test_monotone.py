"""HAWQ's assignment: monotone in sharpness, the best such within the budget, whatever the order of the list."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from nybble.core.errors import UsageError
from nybble.search.loops.monotone import Monotone
from nybble.search.problem import Problem

BITS = (2, 3, 4, 8)


def problem(groups: int, items: int, seed: int) -> Problem:
    """Sharpness, and losses that don't follow it."""
    drawn = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 50, (groups,), generator=drawn).tolist()
    losses = torch.rand(groups, 1, generator=drawn, dtype=torch.float64) * 4.0 ** -torch.tensor(BITS[:items])
    sharp = torch.rand(groups, generator=drawn, dtype=torch.float64).tolist()
    costs = [[size * bits for bits in BITS[:items]] for size in sizes]
    least, most = (sum(pick(row) for row in costs) for pick in (min, max))
    limit = least + int(0.4 * (most - least))
    names = [f"g{i}" for i in range(groups)]
    return Problem(names=names, losses=losses, costs=costs, limit=limit, sharpness=sharp)


@pytest.mark.parametrize(("groups", "items", "seed"), [(6, 4, 0), (7, 3, 1), (8, 2, 2), (1, 4, 3), (5, 1, 4)])
def test_it_is_the_best_of_all_monotone_ones(groups: int, items: int, seed: int) -> None:
    """Check 5 of the sheet: monotone, within the budget; permuting the list permutes the answer."""
    given = problem(groups, items, seed)
    given = replace(given, limit=given.most) if items == 1 else given
    order = sorted(range(groups), key=lambda group: -given.sharpness[group])
    fit = [
        given.loss(choice)
        for choice in itertools.product(range(items), repeat=groups)
        if given.cost(choice) <= given.limit and all(choice[a] >= choice[b] for a, b in itertools.pairwise(order))
    ]
    found = Monotone().solve(given)
    assert all(found[a] >= found[b] for a, b in itertools.pairwise(order))
    assert given.cost(found) <= given.limit and given.loss(found) == pytest.approx(min(fit), rel=1e-9)
    turned = [*reversed(range(groups))]
    other = replace(
        given, names=[given.names[i] for i in turned], losses=given.losses[turned],
        costs=[given.costs[i] for i in turned], sharpness=[given.sharpness[i] for i in turned],
    )  # fmt: skip
    assert tuple(reversed(Monotone().solve(other))) == found


def test_what_is_too_much_to_look_at_is_refused() -> None:
    given = replace(problem(200, 4, 0), losses=torch.rand(200, 6).double(), costs=[[1, 2, 3, 4, 5, 6]] * 200, limit=900)
    with pytest.raises(UsageError, match="all borders between 6 formats in 200 groups, which are too many"):
        Monotone().solve(given)
