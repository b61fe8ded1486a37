"""DARTS: every edge of a cell is a weighted sum of operations, whose weights are learned beside the network's.

Liu, Simonyan and Yang 2019, arXiv:1806.09055. In turn a batch of the second half of the examples moves alphas, at the
present weights (first order) or at w - xi dL/dw (``second_order``), and one of the first half moves weights. At the end
each node keeps its two inputs with the largest weight of an operation that is not ``none``. All branches are live, so
memory grows with their number. Cells that collapse to skip connections are its known failure: their number is told.

A budget is met by channels: the found cells get as many as it allows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.errors import UsageError
from nybble.models.own.cells import edges
from nybble.search.architectures import Found, Study, Training
from nybble.search.choices.blocks import Alphas, choices_of
from nybble.search.choices.cell_space import CellSpace, found_cells, kept
from nybble.search.choices.method import ImageSearch, seeded
from nybble.search.choices.teaching import Pairs, Taught, halves, paired, split

REACH = 0.01
"""Length of the step on both sides whose difference is the second order's product with a Hessian."""


class Mixed(Taught):
    """The loss of weights; in the same call, before it, a step of the alphas."""

    def __init__(self, taught: Taught, rows: Sequence[int], xi: float) -> None:
        super().__init__(taught.task, taught.taught_by, taught.temperature, hard=taught.hard)
        self.rows, self.xi = rows, xi

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], progress: float) -> Tensor:
        """As of :class:`~nybble.training.objective.Objective`; the batch is one of pairs."""
        first, second = halves(batch)
        found: Any = model
        found.alphas.step(self.gradient(model, found.alphas.values, first, second))
        return self.at(model, found.alphas.values, first)

    def at(self, model: nn.Module, values: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss with alphas of these values [edges of both cells, operations]."""
        chances = values.softmax(-1)
        for module, row in zip(choices_of(model), self.rows, strict=True):
            module.weights = chances[row]
        return self.loss(model, batch)

    def gradient(
        self, model: nn.Module, values: Tensor, first: Mapping[str, Tensor], second: Mapping[str, Tensor]
    ) -> Tensor:
        """Of the second batch's loss by alphas, at the present weights or a step of ``xi`` down the first's."""
        if not self.xi:
            return self._by_alphas(model, values, second)
        learned = [p for p in model.parameters() if p.requires_grad]
        down = _gradients(self.at(model, values, first), learned)
        _add(learned, down, -self.xi)
        leaf = values.clone().requires_grad_(True)
        both = torch.autograd.grad(self.at(model, leaf, second), [leaf, *learned], allow_unused=True)
        by_alphas, by_weights = both[0], [_zeros(g, p) for g, p in zip(both[1:], learned, strict=True)]
        _add(learned, down, self.xi)
        size = REACH / float(torch.stack([g.norm() for g in by_weights]).norm())
        _add(learned, by_weights, size)
        above = self._by_alphas(model, values, first)
        _add(learned, by_weights, -2 * size)
        below = self._by_alphas(model, values, first)
        _add(learned, by_weights, size)
        found: Tensor = by_alphas - self.xi * (above - below) / (2 * size)
        return found

    def _by_alphas(self, model: nn.Module, values: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        leaf = values.clone().requires_grad_(True)
        return torch.autograd.grad(self.at(model, leaf, batch), leaf)[0]


def _gradients(loss: Tensor, learned: list[nn.Parameter]) -> list[Tensor]:
    found = torch.autograd.grad(loss, learned, allow_unused=True)
    return [_zeros(g, p) for g, p in zip(found, learned, strict=True)]


def _zeros(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


@torch.no_grad()
def _add(learned: Sequence[Tensor], directions: Sequence[Tensor], by: float) -> None:
    for p, direction in zip(learned, directions, strict=True):
        p.add_(direction, alpha=by)


@dataclass(frozen=True, kw_only=True)
class Darts(ImageSearch):
    """See the module.

    Attributes:
        space: what is searched. supernet: the training of its weights.
        alpha_lr, alpha_decay: of the alphas' Adam, whose betas are 0.5 and 0.999.
        second_order: the step ``xi`` of the alphas' gradient; 0: first order.
    """

    space: CellSpace = field(default_factory=CellSpace)
    supernet: Training = field(default_factory=Training)
    alpha_lr: float = 3e-4
    alpha_decay: float = 1e-3
    second_order: float = 0.0

    def check(self, study: Study) -> None:
        """The budget too."""
        super().check(study)
        if self.alpha_lr <= 0 or self.alpha_decay < 0 or self.second_order < 0:
            raise UsageError("alpha_lr is above 0, alpha_decay and second_order are 0 or more.")
        study.budget.check(*self.space.ends(self.config_of(study)))

    def run(self, study: Study) -> Found:
        """See the module."""
        about, space, rows = self.config_of(study), self.space, self.rows(study)
        first, second = split(rows, self.labels(study, rows).tolist(), None, study.seed)
        seeded(study, "supernet")
        supernet: Any = space.supernet(about)
        count = len(edges(space.nodes))
        supernet.alphas = Alphas(
            [len(space.operations)] * (2 * count), lr=self.alpha_lr, betas=(0.5, 0.999), decay=self.alpha_decay
        )
        with torch.no_grad():
            supernet.alphas.values.copy_(1e-3 * torch.randn(supernet.alphas.values.shape))
        supernet.to(study.device)
        study.train(
            "supernet", supernet, paired([rows[i] for i in first], [rows[i] for i in second]), self.supernet,
            objective=Mixed(self.teacher(study), rows_of(supernet, count), self.second_order),
            task=Pairs(study.task(study.model)),
        )  # fmt: skip
        chances = supernet.alphas.chances().cpu()
        cells = [kept(part, space.operations, space.nodes) for part in chances.split(count)]
        sure = [{"network": "found", "mean largest weight": float(chances.amax(-1).mean())}]
        return found_cells(self, space, study, rows, cells, sure)


def rows_of(model: nn.Module, count: int) -> list[int]:
    """Which row of the alphas each edge of a supernet has: cells of a kind share them."""
    net: Any = model
    found = []
    for cell in net.net.cells:
        found += [number + count * cell.halves for number in range(count)]
    return found


PART = Darts
