"""Loops: the exact one against all choices, both within the limit, and what they are compared with."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from nybble.core.errors import DataError, UsageError
from nybble.search.loops import REGISTRY, Loop
from nybble.search.loops.greedy import Greedy
from nybble.search.loops.ilp import Ilp
from nybble.search.problem import Problem
from nybble.search.yardsticks import at_random, front, reversed_order

BITS = (2, 3, 4, 8)


def problem(groups: int, seed: int, share: float = 0.4, items: int = 4) -> Problem:
    """Losses that fall by four a bit, of groups of many sizes and sensitivities."""
    drawn = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 5000, (groups,), generator=drawn).tolist()
    weights = torch.rand(groups, generator=drawn, dtype=torch.float64).pow(4) + 1e-6
    bits = torch.tensor(BITS[:items], dtype=torch.float64)
    losses = weights[:, None] * 4.0**-bits * (1 + torch.rand(groups, items, generator=drawn, dtype=torch.float64) / 4)
    costs = [[size * b * 1009 for b in BITS[:items]] for size in sizes]
    least, most = sum(row[0] for row in costs), sum(row[-1] for row in costs)
    names = [f"g{i}" for i in range(groups)]
    return Problem(names=names, losses=losses, costs=costs, limit=least + int(share * (most - least)), unit="bytes")


@pytest.mark.parametrize(("groups", "items", "seed"), [(12, 2, 0), (7, 3, 1), (6, 4, 2), (6, 4, 3), (1, 4, 4)])
@pytest.mark.parametrize("share", [0.0, 0.13, 0.5, 0.99, 1.0])
def test_the_integer_program_finds_what_trying_all_finds(groups: int, items: int, seed: int, share: float) -> None:
    given = problem(groups, seed, share, items)
    every = itertools.product(range(items), repeat=groups)
    best = min(given.loss(choice) for choice in every if given.cost(choice) <= given.limit)
    found = Ilp().solve(given)
    assert given.cost(found) <= given.limit
    assert given.loss(found) == pytest.approx(best, rel=1e-9)


def test_ends_of_the_range_and_the_way_between() -> None:
    """Level 0 is all 2 bits, level 1 all 8; a larger limit never loses more (HAWQ-V3, check 6)."""
    given = problem(40, 5)
    found = front(given, Ilp(), 17)
    assert found[0][2] == (0,) * 40 and found[-1][2] == (3,) * 40
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(found))


@pytest.mark.parametrize("name", REGISTRY.names())
@pytest.mark.parametrize("seed", range(4))
def test_every_loop_keeps_the_limit_and_repeats(name: str, seed: int) -> None:
    loop: Loop = REGISTRY.make(name, {})
    given = problem(60, seed)
    found = loop.solve(given)
    assert given.cost(found) <= given.limit
    assert found == loop.solve(given)
    order = list(reversed(range(60)))
    turned = replace(
        given, names=[given.names[i] for i in order], losses=given.losses[order], costs=[given.costs[i] for i in order]
    )
    assert tuple(reversed(loop.solve(turned))) == found  # the order of layers changes nothing but the order
    if loop.near:
        assert given.loss(found) <= 1.1 * given.loss(Ilp().solve(given))
    else:
        assert given.loss(found) < min(given.loss(at_random(given, seed, number)) for number in range(20))


def test_a_limit_is_met_to_the_unit_where_floats_would_not_see_it() -> None:
    """Costs of 10^12 that differ by one: the dearer pair is out by a unit."""
    big = 10**12
    losses = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    given = Problem(names=["a", "b"], losses=losses, costs=[[0, big], [0, big + 1]], limit=2 * big)
    assert given.cost(Ilp().solve(given)) <= given.limit
    assert given.loss(Ilp().solve(given)) == 1.0
    assert given.loss(Ilp().solve(replace(given, limit=2 * big + 1))) == 0.0


@pytest.mark.parametrize("name", REGISTRY.names())
def test_an_impossible_budget_names_the_least(name: str) -> None:
    given = problem(5, 0)
    with pytest.raises(UsageError, match=f"infeasible with this menu; the least is {given.least:,}"):
        REGISTRY.make(name, {}).solve(replace(given, limit=given.least - 1))


def test_losses_that_are_no_numbers() -> None:
    with pytest.raises(DataError, match="sensitivity of b is NaN"):
        Problem(names=["a", "b"], losses=torch.tensor([[0.0], [float("nan")]]).double(), costs=[[1], [1]], limit=2)


def test_random_choices_cost_the_same_and_differ() -> None:
    given = problem(60, 1)
    drawn = [at_random(given, 0, number) for number in range(20)]
    smallest = min(row[1] - row[0] for row in given.costs)
    assert all(0 <= given.limit - given.cost(choice) < smallest * 20 for choice in drawn)
    assert len(set(drawn)) == 20 and drawn[3] == at_random(given, 0, 3)
    assert min(given.loss(choice) for choice in drawn) > given.loss(Ilp().solve(given))


def test_the_reversed_order_gives_bits_to_those_that_need_none() -> None:
    given = problem(30, 2)
    sizes = [row[0] for row in given.costs]
    found = reversed_order(given, Greedy(), sizes)
    need = (given.losses[:, 0] / torch.tensor(sizes)).argsort()
    bits = torch.tensor(found, dtype=torch.float64)
    assert given.cost(found) <= given.limit
    assert bits[need[:10]].mean() > bits[need[-10:]].mean() + 1
