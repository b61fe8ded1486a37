"""A scale that training owns; ``fit`` gives its first value, LSQ's 2 mean|x| / sqrt(Q_P), Q_P the largest value.

Esser et al. 2020, arXiv:1902.08153, section 2.1.
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
class Learned(ScaleRule):
    """Initial value only; estimators and reconstruction supply the learned one through QuantParams."""

    def fit(self, blocks: Tensor, fmt: NumberFormat, rounding: str, weight: Tensor | None = None) -> BlockParams:  # noqa: D102
        mean = Mean().fit(blocks, fmt, rounding, weight).scale
        return BlockParams(divided(2 * mean, math.sqrt(fmt.max if fmt.max > 0 else fmt.absmax)))


PART = Learned
