"""Single Path One-Shot: a supernet whose blocks are drawn for every batch, then evolution over it.

Guo et al. 2019, arXiv:1904.00420; with a teacher's answers in place of labels, and images made of it where there are
none, as Liu et al. 2022 have it (Data-Free NAS, arXiv:2112.02086).

1. train the supernet, one path a batch, drawn at random within a random bin of FLOPs
2. evolve: the error of a path on held-out examples, behind BatchNorm statistics of its own
3. train the best from random weights
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.errors import UsageError
from nybble.core.options import at_least_one
from nybble.search.architectures import Found, Study, Training
from nybble.search.choices.blocks import choose
from nybble.search.choices.chain_space import ChainSpace, rows_of
from nybble.search.choices.macs import Table
from nybble.search.choices.method import ImageSearch, seeded
from nybble.search.choices.teaching import Taught, error, measured_norms, split
from nybble.search.evolution import Candidates, Encoding, Evolution


@dataclass(frozen=True, kw_only=True)
class Bins:
    """Where paths are drawn: from ``low`` to ``high`` times the budget, in equal bins; ``tries`` draws for one bin."""

    low: float = 0.88
    high: float = 1.09
    count: int = 7
    tries: int = 500

    def __post_init__(self) -> None:
        at_least_one(count=self.count, tries=self.tries)
        if not 0 <= self.low < self.high:
            raise UsageError(f"bins go from low to high, times the budget; got {self.low:g} and {self.high:g}.")

    def draw(self, table: Table, limit: int) -> Encoding:
        """A path, of PyTorch's global random numbers; where no draw meets the bin, the last one."""
        number, step = int(torch.randint(self.count, ())), (self.high - self.low) / self.count
        found: Encoding = ()
        for _ in range(self.tries):
            found = tuple(int(torch.randint(len(place), ())) for place in table.places)
            if (self.low + number * step) * limit <= table.of(found) <= (self.low + (number + 1) * step) * limit:
                break
        return found


class SinglePath(Taught):
    """The loss of one path, drawn for each forward."""

    def __init__(self, taught: Taught, bins: Bins, table: Table, limit: int) -> None:
        super().__init__(taught.task, taught.taught_by, taught.temperature, hard=taught.hard)
        self.bins, self.table, self.limit = bins, table, limit

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], progress: float) -> Tensor:
        """As of :class:`~nybble.training.objective.Objective`."""
        choose(model, self.bins.draw(self.table, self.limit))
        return self.loss(model, batch)


@dataclass(frozen=True, kw_only=True)
class Spos(ImageSearch):
    """See the module.

    Attributes:
        space: what is searched. bins: of paths in training.
        supernet: its training. held: examples of each class that are kept back, to compare paths.
        evolution: of paths. start: networks of its first population, each the operations of its blocks.
    """

    space: ChainSpace = field(default_factory=ChainSpace)
    bins: Bins = field(default_factory=Bins)
    supernet: Training = field(default_factory=Training)
    held: int = 8
    evolution: Evolution = field(default_factory=Evolution)
    start: tuple[tuple[str, ...], ...] = ()

    def check(self, study: Study) -> None:
        """The budget too; and that there are paths in the bins."""
        super().check(study)
        at_least_one(held=self.held)
        for words in self.start:
            self.space.encoding(words)
        table = self.space.table(self.config_of(study))
        study.budget.check(table.least, table.most)
        limit = study.budget.limit(table.most)
        if self.bins.low * limit > table.most or self.bins.high * limit < table.least:
            raise UsageError(
                f"bins: no network of the space has {self.bins.low:g} to {self.bins.high:g} times {limit:,} "
                f"multiply-accumulates; they have {table.least:,} to {table.most:,}. Change bins, or the budget."
            )

    def run(self, study: Study) -> Found:
        """See the module."""
        about = self.config_of(study)
        table, rows = self.space.table(about), self.rows(study)
        limit, labels = study.budget.limit(table.most), self.labels(study, rows)
        first, second = split(rows, labels.tolist(), self.held, study.seed)
        learns, held = [rows[i] for i in first], [rows[i] for i in second]
        seeded(study, "supernet")
        supernet: Any = self.space.supernet(about)
        supernet.to(study.device)
        objective = SinglePath(self.teacher(study), self.bins, table, limit)
        study.train("supernet", supernet, learns, self.supernet, objective=objective)
        task = study.task(study.model)

        def score(encoding: Encoding) -> float:
            choose(supernet, encoding)
            measured_norms(supernet, task, learns, self.batch, self.norm_batches)
            return error(supernet.eval(), task, held, labels[second], self.batch)

        scored = self.evolution.run(
            Candidates(
                choices=[len(place) for place in table.places], score=score,
                fits=lambda encoding: table.of(encoding) <= limit, limit=f"{limit:,} multiply-accumulates",
                least=f"The least is {table.least:,}.", start=[self.space.encoding(words) for words in self.start],
            ),
            study.seed, study.keep, study.progress,
        )  # fmt: skip
        best = scored[0].encoding
        seeded(study, "found")
        model: Any = self.space.network(about, best)
        model.to(study.device)
        measures = self.finished(study, model, rows)
        drawn = sorted(each.score for each in scored if each.generation == 0)
        return Found(
            model=model, encoding={"operations": self.space.words(best)}, cost=table.of(best), full=table.most,
            measures=measures, score="error of the supernet's paths",
            front=[
                {"cost": table.of(each.encoding), "score": each.score, "name": " ".join(map(str, each.encoding))}
                for each in scored
            ],
            compared=[
                {"network": "found", "error in the supernet": scored[0].score},
                {"network": f"drawn, median of {len(drawn)}", "error in the supernet": drawn[len(drawn) // 2]},
            ],
            parts=rows_of(self.space, table, best),
        )  # fmt: skip


PART = Spos
