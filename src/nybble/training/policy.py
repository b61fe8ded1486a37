"""A policy over choices that are made at every step of a training: REINFORCE with an entropy term (FLIQS, TuNAS).

Each head (a group of layers, say) has a logit for each of its options. A step draws an option a head, sees a quality Q
and a cost C, and moves the logits by Adam along the gradient of

    -A mean_h log pi_h(a_h) + lambda(t) mean_h H(pi_h)       A = R - ema(R), a number; H the entropy, in nats

The entropy is *added* to what is minimised: it ends the exploration, and comes late (``schedule``), so that weights
that all choices share settle for one of them. Dotzel et al. 2023, arXiv:2308.03290; the absolute reward is TuNAS's
(Bender et al. 2020, arXiv:2008.06120). The mean over heads, the running mean that has the newest reward in it already,
and clamped probabilities are those of the authors' published code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from nybble.core.errors import UsageError
from nybble.core.shapes import Float

LEAST = 1e-8
"""Probabilities are clamped to it, so that each logarithm is a number."""
BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Of Adam."""


@dataclass(frozen=True, kw_only=True)
class PolicyOptions:
    """What is rewarded, and when it ends.

    Attributes:
        reward: of a quality Q at a cost C, of which C0 is wanted: ``absolute`` Q - beta |1 - C/C0|; ``one-sided``
            Q - beta max(0, C/C0 - 1), a budget; ``soft`` Q (C/C0)^beta; ``hard`` Q max(1, C/C0)^beta. In training Q is
            minus the loss; of the last two, which want it above 0, exp(-loss).
        beta: see there; above 0, of ``soft`` and ``hard`` below.
        entropy: the largest lambda. schedule: how it comes to it: as half a ``cosine``, as a ``linear`` rise, in a
            ``step`` at half of the training, or ``constant``.
        delay: share of the training ahead, in which choices are uniform and the policy doesn't learn.
        settle: share of the training from which on nothing is drawn: the most probable choice, made cheaper where it is
            above C0, stays, so that a budget is kept and weights settle for it; 1: never, as published.
        lr: of the logits. mean: what a step leaves of the running mean of rewards. temperature: of the softmax.
    """

    reward: Literal["absolute", "one-sided", "soft", "hard"] = "absolute"
    beta: float = 1.0
    entropy: float = 0.5
    schedule: Literal["cosine", "linear", "step", "constant"] = "cosine"
    delay: float = 0.2
    settle: float = 1.0
    lr: float = 5e-3
    mean: float = 0.99
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.delay < 1:
            raise UsageError(f"delay is {self.delay:g}; it is a share of the training, 0 or more and below 1.")
        if not self.delay < self.settle <= 1:
            raise UsageError(f"settle is {self.settle:g}; it is a share of the training above delay, 1 at most.")
        if not 0 <= self.mean < 1:
            raise UsageError(f"mean is {self.mean:g}; it is what a step leaves of a running mean, 0 or more, below 1.")
        if not 0 <= self.entropy < math.inf:
            raise UsageError(f"entropy is {self.entropy:g}; it is a weight, 0 or more.")
        for name in ("lr", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"{name} is {getattr(self, name):g}; it is a number above 0.")
        above = self.reward in ("absolute", "one-sided")
        if not math.isfinite(self.beta) or (self.beta <= 0 if above else self.beta >= 0):
            raise UsageError(
                f"beta is {self.beta:g}; of the reward {self.reward} it is a number {'above' if above else 'below'} 0."
            )

    def weight(self, progress: float) -> float:
        """Of the entropy at a progress of the training, 0 to 1."""
        if progress < self.delay:
            return 0.0
        u = min(1.0, (progress - self.delay) / (1 - self.delay))
        shares = {"cosine": (1 - math.cos(math.pi * u)) / 2, "linear": u, "step": float(progress >= 0.5)}
        return self.entropy * shares.get(self.schedule, 1.0)

    def rewarded(self, quality: float, share: float) -> float:
        """Of a quality at a cost of so many times what is wanted."""
        if self.reward == "absolute":
            return quality - self.beta * abs(1 - share)
        if self.reward == "one-sided":
            return quality - self.beta * max(0.0, share - 1)
        return float(quality * (share if self.reward == "soft" else max(1.0, share)) ** self.beta)

    def quality(self, loss: float) -> float:
        """What is rewarded of a loss, in nats."""
        return -loss if self.reward in ("absolute", "one-sided") else math.exp(-loss)


class Policy(nn.Module):
    """See the module; all that it is lies in buffers, so that a state dict has it.

    Args:
        sizes: options of each head, one or more.
        options: see there.
    """

    def __init__(self, sizes: Sequence[int], options: PolicyOptions) -> None:
        super().__init__()
        self.sizes, self.options = tuple(sizes), options
        there = torch.arange(max(sizes))[None] < torch.tensor(self.sizes)[:, None]
        self.register_buffer("there", there, persistent=False)
        self.register_buffer("logits", torch.full(there.shape, 0.5, dtype=torch.float64))
        for name in ("first", "second"):  # Adam's moments
            self.register_buffer(name, torch.zeros(there.shape, dtype=torch.float64))
        self.register_buffer("choice", torch.zeros(len(self.sizes), dtype=torch.int64))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("baseline", torch.zeros((), dtype=torch.float64))

    def probabilities(self, logits: Tensor | None = None) -> Float[Tensor, "heads options"]:
        """float64; 0 where a head has no such option."""
        there = self.get_buffer("there")
        asked = self.get_buffer("logits") if logits is None else logits
        found = torch.softmax((asked / self.options.temperature).masked_fill(~there, -math.inf), 1)
        kept: Tensor = found.clamp(LEAST, 1.0) * there
        return kept / kept.sum(1, keepdim=True)

    def loss(self, logits: Tensor, choice: Tensor, advantage: float, weight: float) -> Tensor:
        """What a step minimises, float64 scalar."""
        found = self.probabilities(logits)
        logs = found.clamp_min(LEAST**2).log()
        taken: Tensor = logs.gather(1, choice[:, None]).mean()
        return -advantage * taken - weight * (found * logs).sum(1).mean()

    def sample(self, drawn: torch.Generator, progress: float) -> tuple[int, ...]:
        """An option a head, drawn on the CPU; uniform ahead of ``delay``."""
        there = self.get_buffer("there")
        found = there.double() if progress < self.options.delay else self.probabilities()
        choice = torch.multinomial(found.cpu(), 1, generator=drawn)[:, 0]
        self.get_buffer("choice").copy_(choice)
        return tuple(choice.tolist())

    def update(self, reward: float, progress: float) -> None:
        """Learn from what the newest sample came to; ahead of ``delay`` nothing is."""
        if progress < self.options.delay:
            return
        updates, baseline, kept = self.get_buffer("updates"), self.get_buffer("baseline"), self.options.mean
        before = float(baseline) if int(updates) else reward
        baseline.fill_(kept * before + (1 - kept) * reward)
        advantage = reward - float(baseline)
        with torch.enable_grad():
            logits = self.get_buffer("logits").detach().clone().requires_grad_()
            loss = self.loss(logits, self.get_buffer("choice"), advantage, self.options.weight(progress))
            (gradient,) = torch.autograd.grad(loss, logits)
        self._move(gradient)

    @torch.no_grad()
    def _move(self, gradient: Tensor) -> None:
        """A step of Adam."""
        updates = self.get_buffer("updates").add_(1)
        first, second = self.get_buffer("first"), self.get_buffer("second")
        first.lerp_(gradient, 1 - BETAS[0])
        second.lerp_(gradient.square(), 1 - BETAS[1])
        count = int(updates)
        step = first / (1 - BETAS[0] ** count) / ((second / (1 - BETAS[1] ** count)).sqrt() + EPSILON)
        self.get_buffer("logits").sub_(self.options.lr * step)

    def entropy(self) -> float:
        """Mean over heads, in nats."""
        found = self.probabilities()
        return float(-(found * found.clamp_min(LEAST**2).log()).sum(1).mean())

    def best(self) -> tuple[int, ...]:
        """Each head's most probable option, of equals the first."""
        return tuple(self.probabilities().argmax(1).tolist())

    def within(self, costs: Sequence[Sequence[float]], limit: float) -> tuple[int, ...]:
        """Each head's most probable option, and cheaper ones where their cost is above a limit that can be met.

        Each change is the one that gives up least probability for what it saves.
        """
        logs, choice = self.probabilities().clamp_min(LEAST**2).log().tolist(), list(self.best())
        while (over := sum(row[item] for row, item in zip(costs, choice, strict=True)) - limit) > 0:
            moves = []
            for head, now in enumerate(choice):
                for item, cost in enumerate(costs[head]):
                    if (saved := costs[head][now] - cost) > 0:
                        moves.append(((logs[head][now] - logs[head][item]) / min(saved, over), head, item))
            _, head, item = min(moves)
            choice[head] = item
        return tuple(choice)
