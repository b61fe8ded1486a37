"""ProxylessNAS: each block's operations have chances, learned through binary gates beside the weights.

Cai, Zhu and Han 2019, arXiv:1812.00332. A batch of the first half of the examples moves weights, with one path drawn;
one of the second half moves chances: two operations of each block are drawn, one of them has the gate 1, and

    dL/dalpha_i = sum_j dL/dg_j p_j (delta_ij - p_i)        over the two, p renormalised; dL/dg_j = <dL/dy, o_j(x)>
    + weight * d(expected cost)/dalpha_i

Both are then moved together, so that the chances of the others stay. The found network has the likeliest operations
that the budget allows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.errors import UsageError
from nybble.core.shapes import Float
from nybble.search.architectures import Found, Study, Training
from nybble.search.choices.blocks import Alphas, choices_of, choose
from nybble.search.choices.chain_space import ChainSpace, rows_of
from nybble.search.choices.macs import Table
from nybble.search.choices.method import ImageSearch, seeded
from nybble.search.choices.teaching import Pairs, Taught, halves, paired, split
from nybble.search.loops.ilp import Ilp
from nybble.search.problem import Problem

_TINY = 1e-12


def through_gates(gates: Float[Tensor, "*places live"], chances: Tensor) -> Tensor:
    """dL/dalpha of dL/dg and p, both [..., operations that are live]."""
    return chances * (gates - (gates * chances).sum(-1, keepdim=True))


def expected(chances: Float[Tensor, "places width"], costs: Tensor) -> Float[Tensor, ""]:
    """What a network costs on the average: sum over places and operations of chance times cost."""
    return (chances * costs).sum()


def rescaled(values: Float[Tensor, "places width"], before: Tensor, moved: Tensor) -> Tensor:
    """``values``, those of ``moved`` shifted alike, so that they have the sum of exp that they had ``before``."""
    gone = torch.full_like(values, float("-inf"))
    was, now = (torch.where(moved, x, gone).logsumexp(-1, keepdim=True) for x in (before, values))
    return torch.where(moved, values + was - now, values)


class Gated(Taught):
    """The loss of one path; in the same call, before it, a step of the chances."""

    def __init__(self, taught: Taught, costs: Tensor, weight: float, begins: float) -> None:
        super().__init__(taught.task, taught.taught_by, taught.temperature, hard=taught.hard)
        self.costs, self.weight, self.begins = costs, weight, begins

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], progress: float) -> Tensor:
        """As of :class:`~nybble.training.objective.Objective`; the batch is one of pairs."""
        first, second = halves(batch)
        found: Any = model
        if progress >= self.begins:
            self.move(model, second)
        choose(model, torch.multinomial(found.alphas.chances().cpu(), 1)[:, 0].tolist())
        return self.loss(model, first)

    def move(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        """A step of the chances, of two operations of each block that has as many."""
        found: Any = model
        alphas: Alphas = found.alphas
        several = torch.tensor([count > 1 for count in alphas.counts], device=alphas.values.device)
        if not several.any():
            return
        two = drawn_twice(alphas.values, several)
        kept = alphas.values.gather(1, two).softmax(-1)
        gates = torch.zeros_like(kept).scatter_(1, torch.multinomial(kept.cpu(), 1).to(kept.device), 1.0)
        gates.requires_grad_(True)
        for place, module in enumerate(choices_of(model)):
            module.chosen, module.weights, module.live = 0, None, None
            if several[place]:
                module.weights = torch.zeros_like(alphas.values[place]).scatter(0, two[place], gates[place])
                module.live = two[place].tolist()
        (of_gates,) = torch.autograd.grad(self.loss(model, batch), gates)
        values = alphas.values.clone().requires_grad_(True)
        (of_cost,) = torch.autograd.grad(expected(values.softmax(-1), self.costs), values)
        of_two = through_gates(of_gates, kept) + self.weight * of_cost.gather(1, two)
        of_two = of_two - of_two.mean(
            -1, keepdim=True
        )  # what both have alike is undone below, and Adam's step is a sign
        gradient = torch.zeros_like(alphas.values).scatter(1, two, of_two)
        moves = torch.zeros_like(values, dtype=torch.bool).scatter(1, two, True) & several[:, None]
        before = alphas.values.clone()
        alphas.step(gradient, moves)
        with torch.no_grad():
            alphas.values.copy_(rescaled(alphas.values, before, moves))


def drawn_twice(values: Tensor, several: Tensor) -> Tensor:
    """Two different operations of each place, int64 [places, 2], by their chances; of no meaning where there is one."""
    chances = torch.where(values.isfinite(), values.softmax(-1) + _TINY, 0)  # float32 may have made a 0 of one
    chances = torch.where(several[:, None], chances, 1.0)
    return torch.multinomial(chances.cpu(), 2).to(values.device)


@dataclass(frozen=True, kw_only=True)
class Proxyless(ImageSearch):
    """See the module.

    Attributes:
        space: what is searched. supernet: the training of its weights.
        alpha_lr, alpha_decay: of the chances' Adam, whose betas are 0 and 0.999.
        cost_weight: of the expected cost, as a share of the largest network's, in the loss.
        begins: share of the training in which only weights move.
    """

    space: ChainSpace = field(
        default_factory=lambda: ChainSpace(operations=(*(f"mb-{e}-{k}" for e in (3, 6) for k in (3, 5, 7)), "skip"))
    )
    supernet: Training = field(default_factory=Training)
    alpha_lr: float = 1e-3
    alpha_decay: float = 0.0
    cost_weight: float = 0.1
    begins: float = 0.2

    def check(self, study: Study) -> None:
        """The budget too."""
        super().check(study)
        if self.alpha_lr <= 0 or self.alpha_decay < 0 or self.cost_weight < 0 or not 0 <= self.begins < 1:
            raise UsageError("alpha_lr is above 0, alpha_decay and cost_weight 0 or more, begins from 0 to below 1.")
        table = self.space.table(self.config_of(study))
        study.budget.check(table.least, table.most)

    def run(self, study: Study) -> Found:
        """See the module."""
        about = self.config_of(study)
        table, rows = self.space.table(about), self.rows(study)
        first, second = split(rows, self.labels(study, rows).tolist(), None, study.seed)
        seeded(study, "supernet")
        supernet: Any = self.space.supernet(about)
        counts = [len(place) for place in table.places]
        supernet.alphas = Alphas(counts, lr=self.alpha_lr, betas=(0.0, 0.999), decay=self.alpha_decay)
        supernet.to(study.device)
        costs = _padded(table).to(study.device) / table.most
        task = study.task(study.model)
        study.train(
            "supernet", supernet, paired([rows[i] for i in first], [rows[i] for i in second]), self.supernet,
            objective=Gated(self.teacher(study), costs, self.cost_weight, self.begins), task=Pairs(task),
        )  # fmt: skip
        chances = supernet.alphas.chances().cpu().double()
        best = likeliest(chances, table, study.budget.limit(table.most))
        seeded(study, "found")
        model: Any = self.space.network(about, best)
        model.to(study.device)
        measures = self.finished(study, model, rows)
        parts = [
            {**row, "chance": float(chances[place, number])}
            for place, (row, number) in enumerate(zip(rows_of(self.space, table, best), best, strict=True))
        ]
        return Found(
            model=model, encoding={"operations": self.space.words(best)}, cost=table.of(best), full=table.most,
            measures=measures, parts=parts,
            compared=[
                {"network": "found", "multiply-accumulates": table.of(best)},
                {"network": "expected", "multiply-accumulates": table.fixed + float(expected(chances, _padded(table)))},
            ],
        )  # fmt: skip


def _padded(table: Table) -> Tensor:
    """Costs [places, most operations], 0 where a place has fewer."""
    width = max(map(len, table.places))
    return torch.tensor([[*place, *[0] * (width - len(place))] for place in table.places], dtype=torch.float64).float()


def likeliest(chances: Tensor, table: Table, limit: int) -> Sequence[int]:
    """The network with the largest product of chances within a limit; the arg-max where that fits."""
    plain = chances.argmax(-1).tolist()
    if table.of(plain) <= limit:
        return [int(number) for number in plain]
    width = chances.shape[-1]
    losses = -chances.clamp_min(_TINY).log()
    costs = [[*place, *[limit + 1] * (width - len(place))] for place in table.places]  # what isn't there never fits
    names = [f"block {number}" for number in range(len(costs))]
    problem = Problem(names=names, losses=losses, costs=costs, limit=limit - table.fixed, unit="multiply-accumulates")
    return [int(number) for number in Ilp().solve(problem)]


PART = Proxyless
