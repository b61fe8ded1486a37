"""One network of a space, named or drawn within the budget, and trained: the yardstick of every search.

Of chains those count whose cost is from ``near`` times the budget to all of it; cells get the channels that it allows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from nybble.core.errors import UsageError
from nybble.core.seeds import generator
from nybble.search.architectures import Found, Study
from nybble.search.choices.cell_space import CellSpace, Node, found_cells
from nybble.search.choices.chain_space import ChainSpace, rows_of
from nybble.search.choices.macs import Table
from nybble.search.choices.method import ImageSearch, seeded

TRIES = 20_000


@dataclass(frozen=True, kw_only=True)
class Alone(ImageSearch):
    """See the module.

    Attributes:
        chain, cells: the space; one of them.
        operations: of each block of a chain; none: they are drawn.
        near: least share of the budget that a drawn chain has.
    """

    chain: ChainSpace | None = None
    cells: CellSpace | None = None
    operations: tuple[str, ...] = ()
    near: float = 0.95

    def check(self, study: Study) -> None:
        """The budget and the network too."""
        super().check(study)
        if (self.chain is None) == (self.cells is None):
            raise UsageError("alone: name one space, chain or cells.")
        about = self.config_of(study)
        if self.chain is None:
            assert self.cells is not None
            study.budget.check(*self.cells.ends(about))
            return
        table = self.chain.table(about)
        study.budget.check(table.least, table.most)
        self._encoding(self.chain, table, study)

    def run(self, study: Study) -> Found:
        """See the module."""
        rows = self.rows(study)
        if self.chain is None:
            assert self.cells is not None
            return found_cells(self, self.cells, study, rows, self._drawn_cells(self.cells, study))
        about = self.config_of(study)
        table = self.chain.table(about)
        encoding = self._encoding(self.chain, table, study)
        seeded(study, "found")
        model: Any = self.chain.network(about, encoding)
        model.to(study.device)
        return Found(
            model=model, encoding={"operations": self.chain.words(encoding)}, cost=table.of(encoding),
            full=table.most, measures=self.finished(study, model, rows), parts=rows_of(self.chain, table, encoding),
        )  # fmt: skip

    def _encoding(self, space: ChainSpace, table: Table, study: Study) -> tuple[int, ...]:
        """As named, or drawn.

        Raises:
            UsageError: as of :meth:`ChainSpace.encoding`, or nothing is within the budget.
        """
        limit = study.budget.limit(table.most)
        if self.operations:
            found = space.encoding(self.operations)
            if table.of(found) > limit:
                raise UsageError(f"alone: the network has {table.of(found):,} multiply-accumulates, above {limit:,}.")
            return found
        names, drawn = space.names(), generator(study.seed, "search", "alone")
        for _ in range(TRIES):
            found = tuple(int(torch.randint(len(fit), (), generator=drawn)) for fit in names)
            if self.near * limit <= table.of(found) <= limit:
                return found
        raise UsageError(
            f"alone: none of {TRIES:,} networks drawn has {self.near:g} to 1 times {limit:,} multiply-accumulates; "
            "give a smaller near, or another budget."
        )

    def _drawn_cells(self, space: CellSpace, study: Study) -> list[list[Node]]:
        """Two inputs and two operations of each node."""
        drawn = generator(study.seed, "search", "alone")
        names = [name for name in space.operations if name != "none"]
        cells = []
        for _ in range(2):
            cell: list[Node] = [[] for _ in range(space.nodes)]
            for node in range(len(cell)):
                for source in sorted(torch.randperm(2 + node, generator=drawn)[:2].tolist()):
                    cell[node].append((source, names[int(torch.randint(len(names), (), generator=drawn))]))
            cells.append(cell)
        return cells


PART = Alone
