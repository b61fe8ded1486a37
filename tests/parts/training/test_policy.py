"""The policy of FLIQS: schedules, rewards, gradient, the bandit of 729 configurations, and what is refused."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import pytest
import torch

from nybble.core.errors import UsageError
from nybble.search.loops.policy import PolicyLoop
from nybble.search.problem import Choice, Problem
from nybble.training.policy import Policy, PolicyOptions


@pytest.mark.parametrize(
    ("schedule", "middle"), [("cosine", 0.25), ("linear", 0.25), ("step", 0.5), ("constant", 0.5)]
)  # fmt: skip
def test_schedules(schedule: Literal["cosine", "linear", "step", "constant"], middle: float) -> None:
    """Nothing up to the delay, and all of lambda in the end (check 1)."""
    options = PolicyOptions(schedule=schedule, entropy=0.5, delay=0.2)
    found = [options.weight(step / 1000) for step in range(1001)]
    assert found[199] == 0 and found[1000] == pytest.approx(0.5) and found == sorted(found)
    assert found[600] == pytest.approx(middle)
    if schedule in ("cosine", "linear"):
        assert found[200] == 0
    if schedule == "cosine":
        assert found[400] == pytest.approx(0.5 * (1 - 2**-0.5) / 2)  # a quarter of the way
    if schedule == "step":
        assert found[499] == 0 and found[500] == 0.5


@pytest.mark.parametrize(
    ("reward", "beta", "wanted"),
    [
        ("absolute", 0.6, (0.8 - 0.3, 0.8, 0.8 - 0.6)),
        ("one-sided", 0.6, (0.8, 0.8, 0.8 - 0.6)),
        ("soft", -0.5, (0.8 * 2**0.5, 0.8, 0.8 / 2**0.5)),
        ("hard", -0.5, (0.8, 0.8, 0.8 / 2**0.5)),
    ],
)
def test_rewards(reward: Any, beta: float, wanted: tuple[float, ...]) -> None:
    """At half the wanted cost, at it, at twice; the absolute one is largest at it (check 2)."""
    options = PolicyOptions(reward=reward, beta=beta)
    assert [options.rewarded(0.8, share) for share in (0.5, 1.0, 2.0)] == pytest.approx(wanted)
    assert options.quality(1.5) == pytest.approx(-1.5 if beta > 0 else 0.22313016)  # exp(-1.5)


def test_the_gradient_is_that_of_reinforce_and_entropy() -> None:
    """By differences, and in closed form: -A/K (1_a - p) - lambda/K p (log p + H); heads of two sizes (check 3)."""
    policy = Policy([3, 2], PolicyOptions(temperature=1.0))
    logits = torch.tensor([[0.3, -0.2, 0.9], [0.1, 0.7, 5.0]], dtype=torch.float64, requires_grad=True)
    choice, advantage, weight = torch.tensor([2, 0]), 0.7, 0.3

    def loss(at: torch.Tensor) -> torch.Tensor:
        return policy.loss(at, choice, advantage, weight)

    assert torch.autograd.gradcheck(loss, (logits,))
    (found,) = torch.autograd.grad(loss(logits), logits)
    for row, size in enumerate((3, 2)):
        p = torch.softmax(logits[row, :size].detach(), 0)
        taken = torch.nn.functional.one_hot(choice[row], size)
        entropy = -(p * p.log()).sum()
        wanted = -advantage / 2 * (taken - p) - weight / 2 * p * (p.log() + entropy)
        torch.testing.assert_close(found[row, :size], wanted, rtol=1e-9, atol=1e-12)
    assert found[1, 2] == 0


def test_steps_are_torchs_adam_and_the_baseline_has_the_newest_reward() -> None:
    options = PolicyOptions(entropy=0.1, delay=0.1, lr=0.03, schedule="constant")
    policy, other = Policy([3, 2], options), torch.full((2, 3), 0.5, dtype=torch.float64, requires_grad=True)
    adam, drawn, baseline = torch.optim.Adam([other], lr=0.03), torch.Generator().manual_seed(0), None
    policy.sample(drawn, 0.05)
    policy.update(9.0, 0.05)  # ahead of the delay: nothing is learned
    assert torch.equal(policy.get_buffer("logits"), other.detach()) and float(policy.get_buffer("baseline")) == 0
    for reward in (1.0, -0.5, 0.25, 2.0):
        policy.sample(drawn, 0.5)
        baseline = reward if baseline is None else 0.99 * baseline + 0.01 * reward
        adam.zero_grad()
        torch.autograd.backward(policy.loss(other, policy.get_buffer("choice"), reward - baseline, 0.1))
        adam.step()
        policy.update(reward, 0.5)
        torch.testing.assert_close(policy.get_buffer("logits"), other.detach(), rtol=1e-9, atol=1e-12)


def bandit(seed: int) -> Problem:
    """Six layers in 2, 4 or 8 bits; what is lost adds up."""
    drawn = torch.Generator().manual_seed(seed)
    weights = torch.rand(6, generator=drawn, dtype=torch.float64) + 0.2
    losses = weights[:, None] * torch.tensor([1.0, 0.3, 0.02], dtype=torch.float64)
    sizes = torch.randint(1, 5, (6,), generator=drawn).tolist()
    costs = [[size * bits for bits in (2, 4, 8)] for size in sizes]
    return Problem(names=[str(i) for i in range(6)], losses=losses, costs=costs, limit=4 * sum(sizes))


@pytest.mark.parametrize(
    ("seed", "options", "entropy", "rank"),
    [
        (1, {"entropy": 0.05, "lr": 0.02}, (0, 0.06), (0, 7)),  # within the best hundredth
        (1, {"entropy": 0.0, "lr": 0.02}, (0.1, 1), (0, 728)),  # nothing ends the exploration
        (0, {"entropy": 0.5, "lr": 0.05, "schedule": "constant"}, (0, 0.06), (60, 728)),  # it ends too early
    ],
)
def test_the_bandit(
    seed: int, options: dict[str, Any], entropy: tuple[float, float], rank: tuple[int, int]
) -> None:  # fmt: skip
    """A noise as large as what there is to be found, and where the end is among all 729 (check 4)."""
    given, noise = bandit(seed), torch.Generator().manual_seed(seed + 100)
    loop = PolicyLoop(steps=6000, seed=seed, delay=0.1, beta=2.0, **options)

    def reward(choice: Choice) -> float:
        return loop.rewarded(-given.loss(choice), given.cost(choice) / given.limit)

    policy = loop.searched(given, lambda choice: given.loss(choice) + float(torch.randn((), generator=noise)))
    found = reward(policy.best())
    better = sum(reward(choice) > found + 1e-12 for choice in itertools.product(range(3), repeat=6))
    assert entropy[0] <= policy.entropy() <= entropy[1]
    assert rank[0] <= better <= rank[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delay": 1.0}, "delay is 1;"),
        ({"beta": -1.0}, "beta is -1; of the reward absolute it is a number above 0"),
        ({"reward": "soft"}, "beta is 1; of the reward soft it is a number below 0"),
        ({"mean": 1.0}, "mean is 1;"),
        ({"lr": 0.0}, "lr is 0;"),
        ({"entropy": -0.1}, "entropy is -0.1;"),
        ({"temperature": 0.0}, "temperature is 0;"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PolicyOptions(**options)
