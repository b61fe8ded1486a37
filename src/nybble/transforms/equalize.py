"""Cross-layer weight equalisation: rows of one linear layer and columns of the next get the same range.

Nagel et al. 2019, arXiv:1906.04721, eq. 11: ``s_i = sqrt(r1_i / r2_i)`` with r1_i the largest magnitude in row i of the
first layer and r2_i that in column i of the second. No data is needed; layers without a linear pair stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.models.adapter import LinearFold, NormFold
from nybble.transforms._folds import Channel, Scaling, rounded_to_pow2, safe_factor


@dataclass(frozen=True, kw_only=True)
class Equalize(Scaling):
    """``pow2``: powers of two only, so that the rewritten model computes bit for bit the same in float."""

    pow2: bool = False

    def takes(self, fold: NormFold | LinearFold) -> bool:  # noqa: D102
        return isinstance(fold, LinearFold)

    def factor(self, channel: Channel) -> Tensor:  # noqa: D102
        assert channel.before is not None  # takes() lets linear pairs in alone
        first = channel.before.abs().amax(1)
        second = torch.stack([w.abs().flatten(0, -2).amax(0) for w in channel.behind]).amax(0)
        found = safe_factor((first / second).sqrt(), (first > 0) & (second > 0))
        return rounded_to_pow2(found) if self.pow2 else found


PART = Equalize
