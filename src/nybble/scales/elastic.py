"""Where a learned scale of very few bits begins: twice the mean magnitude, of what is never negative four times.

    formats with a sign: 2 mean|x| / sqrt(Q_P)          without: 4 mean|x| / sqrt(2**bits - 1)

Q_P is the largest value. As the published code of BiT (Liu et al. 2022, "BiT: Robustly Binarized Multi-distilled
Transformer", arXiv:2205.13016) and of TBT (Liu et al. 2023, arXiv:2306.01841) begins; it has the second form for three
levels, whose Q_P is 2, too. BiT's text begins at the least-squares optimum, ``scale=mean`` for {-a, a} and
``scale=mean(least=0.5)`` for {0, a}.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nybble.core.arithmetic import divided
from nybble.formats import NumberFormat
from nybble.scales import BlockParams, ScaleRule
from nybble.scales.mean import Mean

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Elastic(ScaleRule):
    """Initial value only; the learned part of that name moves it."""

    def fit(self, blocks: Tensor, fmt: NumberFormat, rounding: str, weight: Tensor | None = None) -> BlockParams:  # noqa: D102
        mean = Mean().fit(blocks, fmt, rounding, weight).scale
        if fmt.signed:
            return BlockParams(divided(2 * mean, math.sqrt(fmt.max if fmt.max > 0 else fmt.absmax)))
        return BlockParams(divided(4 * mean, math.sqrt(2**fmt.bits - 1)))


PART = Elastic
