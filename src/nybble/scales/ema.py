"""Moving averages over calibration batches of their smallest and largest values, as Q-ASR observes activations.

For static activations: ``low`` and ``high`` begin with the first batch's, and every later batch moves them by
``1 - momentum`` towards its own, so they are smaller than the extremes of all (Kim et al. 2021, arXiv:2103.16827). The
scale is the larger magnitude's. What is measured on one tensor is one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nybble.core.arithmetic import divided
from nybble.core.errors import UsageError
from nybble.formats import NumberFormat
from nybble.scales import BlockParams, ScaleRule
from nybble.scales.minmax import ends, fit_range

if TYPE_CHECKING:
    from torch import Tensor

RUNNING = -1.0


@dataclass(frozen=True)
class Ema(ScaleRule):
    """``momentum``: of the average, 0 to 1; -1 takes the extremes of all batches instead.

    ``p``: percent of a batch's values below its high end, and above its low one; 100 takes the extremes.
    ``one_sided``: what is nowhere negative (behind a ReLU) gets all codes, by an integer zero point at the lowest one.
    """

    momentum: float = 0.95
    p: float = 100.0
    one_sided: bool = False

    def __post_init__(self) -> None:
        if not (0 <= self.momentum < 1 or self.momentum == RUNNING):
            raise UsageError(f"ema(momentum={self.momentum}): at least 0 and below 1, or -1 for the extremes of all.")
        if not 50 < self.p <= 100:
            raise UsageError(f"ema(p={self.p}): p is above 50 and at most 100.")

    @property
    def needs_integer(self) -> bool:  # noqa: D102
        return self.one_sided

    @property
    def averages(self) -> bool:  # noqa: D102
        return True

    def averaged(self, batches: Sequence[Tensor]) -> tuple[Tensor, Tensor]:  # noqa: D102
        found = [self._ends(batch.reshape(1, -1)) for batch in batches]
        low, high = found[0]
        for below, above in found[1:]:
            if self.momentum == RUNNING:
                low, high = low.minimum(below), high.maximum(above)
            else:
                low = self.momentum * low + (1 - self.momentum) * below
                high = self.momentum * high + (1 - self.momentum) * above
        return low, high

    def fit_ends(self, low: Tensor, high: Tensor, fmt: NumberFormat) -> BlockParams:  # noqa: D102
        import torch

        if not self.one_sided:
            return BlockParams(divided(torch.maximum(-low, high).clamp(min=0), fmt.absmax))
        positive = fit_range(low, high, fmt, offset=False)
        if fmt.min >= 0 or positive.zero_point is None:
            return positive
        # Where there are both signs, 0 stays at code 0, and the scale is what both have codes for.
        both, one = divided(torch.maximum(-low, high), fmt.max), low >= 0
        return BlockParams(
            torch.where(one, positive.scale, both), zero_point=torch.where(one, positive.zero_point, 0.0)
        )

    def fit(self, blocks: Tensor, fmt: NumberFormat, rounding: str, weight: Tensor | None = None) -> BlockParams:  # noqa: D102
        return self.fit_ends(*self._ends(blocks, weight), fmt)

    def _ends(self, blocks: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Low and high end of each block, [blocks, 1]; padding, of weight 0, takes no part."""
        import torch

        low, high = ends(blocks, weight)
        if self.p == 100:
            return low, high
        real = torch.ones_like(blocks) if weight is None else (weight > 0).expand_as(blocks).float()
        count, share = real.sum(1, keepdim=True).clamp(min=1), self.p / 100
        ordered = torch.where(real > 0, blocks, torch.inf).sort(1).values
        poison = low * 0 + high * 0  # a NaN sorts last
        found = [_at(ordered, (count - 1).double() * part) + poison for part in (1 - share, share)]
        return found[0], found[1]


def _at(ordered: Tensor, position: Tensor) -> Tensor:
    """The value at a place between two of each row, linearly interpolated."""
    below, above = ordered.gather(1, position.floor().long()), ordered.gather(1, position.ceil().long())
    return below + (above - below) * (position - position.floor()).float()


PART = Ema
