"""A policy chooses, for each forward, which of a menu's formats each layer has, and learns from the loss (FLIQS).

Weights and policy train together (Dotzel et al. 2023, arXiv:2308.03290): layers whose part is a ``menu``
(:mod:`nybble.learned.menu`) round one float weight to the format that was drawn; the loss of that forward, and what the
drawn formats cost, are the policy's reward (:mod:`nybble.training.policy`). Between updates, and in the end, each layer
has its most probable format: what is packed is what was searched, without a training behind it.

    learned: {weights: {menu: {others: [int8 channel]}}, inputs: {menu: {others: [int8]}}}
    callbacks: {policy: {target: 5.0}}

``nybble search --method fliqs`` says all this, with the costs of a budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nybble.core import ranks
from nybble.core.errors import SchemeError, UsageError, did_you_mean
from nybble.learned import Learned, Menu
from nybble.nn.twin import FakeWeight, Twin
from nybble.training.callbacks import Acting, Callback, rounded_weights
from nybble.training.policy import Policy, PolicyOptions

NAME = "policy"


@dataclass(frozen=True, kw_only=True)
class Group:
    """Layers that share a format.

    Attributes:
        names: of them. menus: of their weights, and of what enters or leaves. costs: of each format.
    """

    names: Sequence[str]
    menus: Sequence[Menu]
    costs: Sequence[float]


class Choosing(Acting):
    """See the module.

    Args:
        weights: by name. groups: of them. policy: in the model's state. options: of the callback.
    """

    def __init__(
        self, weights: Mapping[str, FakeWeight], groups: Sequence[Group], policy: Policy, options: PolicyCallback
    ) -> None:
        self.weights, self.groups, self.policy, self.options = weights, groups, policy, options
        self._progress = 0.0

    def before_forward(self, progress: float, drawn: torch.Generator) -> None:  # noqa: D102
        self._progress = progress
        if not self._settled:
            self.choose(self.policy.sample(drawn, progress))

    def after_forward(self, loss: Tensor) -> None:  # noqa: D102
        lost, cost = float(loss), self.cost(self.policy.get_buffer("choice").tolist())
        if not torch.isfinite(loss):
            return  # the loop has an error for it
        if self._settled:
            cost = self.cost(self.best())
        reward = self.options.rewarded(self.options.quality(lost), cost / self.options.target)
        if not self._settled:
            self.policy.update(reward, self._progress)
        self.policy.get_buffer("newest").copy_(torch.tensor([self.policy.entropy(), cost, reward], dtype=torch.float64))

    def after_update(self, progress: float) -> None:  # noqa: D102
        self.choose(self.best())

    @property
    def _settled(self) -> bool:
        return self._progress >= self.options.settle < 1

    def best(self) -> tuple[int, ...]:
        """The most probable formats, where the end is to keep the cost those within it."""
        if self.options.settle == 1:
            return self.policy.best()
        return self.policy.within([group.costs for group in self.groups], self.options.target)

    def choose(self, choice: Sequence[int]) -> None:
        """Use these formats."""
        for group, item in zip(self.groups, choice, strict=True):
            for menu in group.menus:
                menu.choose(item)

    def cost(self, choice: Sequence[int]) -> float:
        """Of formats of all groups."""
        return sum(group.costs[item] for group, item in zip(self.groups, choice, strict=True))

    def newest(self) -> dict[str, float]:
        """``entropy`` of the policy, mean nats a group; ``cost`` of what was drawn, and its ``reward``."""
        return dict(zip(("entropy", "cost", "reward"), self.policy.get_buffer("newest").tolist(), strict=True))

    def layers(self) -> dict[str, dict[str, float]]:
        """``weights``; ``choice``, the number of the format, its ``probability`` and its ``bits``."""
        found = {}
        likely, best = self.policy.probabilities().tolist(), self.best()
        for row, item, group in zip(likely, best, self.groups, strict=True):
            for name, menu in zip(group.names, group.menus, strict=False):
                count, bits = self.weights[name].latent.numel(), _bits(menu)[item]
                found[name] = {"weights": count, "choice": item, "probability": row[item], "bits": bits}
        return {name: found[name] for name in self.weights}


@dataclass(frozen=True, kw_only=True)
class PolicyCallback(PolicyOptions, Callback):
    """See the module, and for its other options that of policies.

    Attributes:
        target: the cost that is wanted; without ``costs`` in mean bits of a weight.
        groups: by name layers that share a format; none: each has its own.
        costs: of each group in each format of the menu; none: mean bits of a weight.
    """

    target: float = 4.0
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    costs: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.target < float("inf"):
            raise SchemeError(f"policy: target={self.target:g} is a cost; give a number above 0.")

    def attach(self, model: nn.Module) -> Choosing:  # noqa: D102
        if ranks.size() > 1:
            raise UsageError("a policy learns from each forward in turn, in one process; start the training in one.")
        weights = rounded_weights(model, NAME)
        menus = {name: _menus(model, name, weight) for name, weight in weights.items()}
        groups = [self._group(name, members, menus, weights) for name, members in self._grouped([*weights]).items()]
        least = sum(min(group.costs) for group in groups)
        if self.settle < 1 and least > self.target:
            raise SchemeError(f"policy: target={self.target:g} can't be met; the least is {least:g}.")
        first = next(iter(weights.values()))
        if NAME not in first._modules:
            policy = Policy([len(group.costs) for group in groups], self)
            policy.register_buffer("newest", torch.zeros(3, dtype=torch.float64))
            first.add_module(NAME, policy.to(first.latent.device))
        kept = first.get_submodule(NAME)
        assert isinstance(kept, Policy)
        return Choosing(weights, groups, kept, self)

    def _grouped(self, names: Sequence[str]) -> dict[str, Sequence[str]]:
        """Every layer in one group."""
        seen: dict[str, str] = {}
        for group, members in self.groups.items():
            for name in members:
                if name not in names:
                    raise SchemeError(f"policy: groups: {name} has no menu.{did_you_mean(name, names)}")
                if name in seen:
                    raise SchemeError(f"policy: groups: {name} is in {seen[name]} and {group}; it has one format.")
                seen[name] = group
        if self.groups and (left := [name for name in names if name not in seen]):
            raise SchemeError(f"policy: groups: {left[0]} is in none; add it to one, or as one of its own.")
        return dict(self.groups) or {name: [name] for name in names}

    def _group(
        self, name: str, members: Sequence[str], menus: Mapping[str, Sequence[Menu]], weights: Mapping[str, FakeWeight]
    ) -> Group:
        found = [menus[each][0] for each in members] + [menu for each in members for menu in menus[each][1:]]
        sizes = {len(menu.dishes) for menu in found}
        if len(sizes) > 1:
            raise SchemeError(f"policy: menus of {name} have {sorted(sizes)} choices; give all the same number.")
        if self.costs and len(self.costs.get(name, ())) != min(sizes):
            raise SchemeError(f"policy: costs of {name} are {len(self.costs.get(name, ()))} for {min(sizes)} formats.")
        every = sum(weight.latent.numel() for weight in weights.values())
        share = sum(weights[each].latent.numel() for each in members) / every
        costs = self.costs.get(name) or [share * each for each in _bits(found[0])]
        return Group(names=members, menus=found, costs=costs)


def _bits(menu: Menu) -> list[int]:
    """Of the codes of each choice."""
    return [dish.quantizer.format.bits for dish in menu.dishes if isinstance(dish, Learned)]


def _menus(model: nn.Module, name: str, weight: FakeWeight) -> list[Menu]:
    """Of the weight, then of what enters and leaves its layer."""
    twin = model.get_submodule(name)
    found = [part for _, part in twin.learned() if isinstance(part, Menu)] if isinstance(twin, Twin) else []
    if not isinstance(weight.learned, Menu) or weight.learned not in found:
        raise SchemeError(f"{name} has no menu to choose from; learn its weights by one: learned: {{weights: menu}}.")
    return [weight.learned, *(menu for menu in found if menu is not weight.learned)]


PART = PolicyCallback
