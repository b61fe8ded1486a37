"""What a loop is given: losses and costs of some groups of layers in each format, and a limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.core.errors import DataError, UsageError
from nybble.core.shapes import Float

Choice = tuple[int, ...]
"""The number of a format of the menu for each group."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Choose one format a group: the smallest sum of ``losses`` with a sum of ``costs`` of at most ``limit``.

    Attributes:
        names: of the groups. losses: float64 [groups, menu], any unit, finite.
        costs: by group and format, whole numbers. limit: the most that they may come to. unit: of the costs.
        sharpness: of each group for each of its weights, where it was measured: a loop may go by its order.
        bits: of each format's sides (weights, inputs); none: a loop that goes by levels goes by cost.

    Raises:
        DataError: a loss that is no finite number; names the group.
    """

    names: Sequence[str]
    losses: Float[Tensor, "groups menu"]
    costs: Sequence[Sequence[int]]
    limit: int
    unit: str = ""
    bits: Sequence[tuple[int, ...]] = ()
    sharpness: Sequence[float] = ()

    def __post_init__(self) -> None:
        bad = (~torch.isfinite(self.losses)).any(1)
        if bool(bad.any()):
            name = self.names[int(bad.nonzero()[0])]
            raise DataError(f"the sensitivity of {name} is NaN or Inf; check the data, the weights and the dtype.")

    @property
    def least(self) -> int:
        """The cost of every group's cheapest format."""
        return sum(min(row) for row in self.costs)

    @property
    def most(self) -> int:
        """The cost of every group's dearest format."""
        return sum(max(row) for row in self.costs)

    def cost(self, choice: Sequence[int]) -> int:
        """What a choice costs."""
        return sum(row[item] for row, item in zip(self.costs, choice, strict=True))

    def loss(self, choice: Sequence[int]) -> float:
        """What it is expected to lose, in the sensitivity's unit."""
        return float(sum(row[item] for row, item in zip(self.losses.tolist(), choice, strict=True)))

    def check(self, shown: float | None = None, least: float | None = None) -> None:
        """Refuse a limit that nothing meets.

        Args:
            shown: the limit as it was asked for.
            least: what could be, in the same unit.

        Raises:
            UsageError: the message has the least.
        """
        if self.least > self.limit:
            asked, found = self.limit if shown is None else shown, self.least if least is None else least
            raise UsageError(
                f"a budget of {_number(asked)} {self.unit} is infeasible with this menu; the least is "
                f"{_number(found)}. Raise the budget, or add a smaller format to the menu."
            )


def _number(value: float) -> str:
    return f"{value:,}" if float(value).is_integer() else f"{value:,.6g}"
