"""SmoothQuant: move a part of the inputs' range into the weights that read them.

Xiao et al. 2022, arXiv:2211.10438, eq. 4: ``s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)`` for each input channel j, the
maximum over all weights that read it; inputs are divided by s (in the norm before them), weights multiplied by s.
``alpha`` 0.5 halves the difficulty, more moves more of it into the weights (the paper: 0.75 for GLM-130B).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.core.errors import SchemeError
from nybble.models.adapter import LinearFold, NormFold
from nybble.transforms._folds import Channel, Scaling, rounded_to_pow2, safe_factor


@dataclass(frozen=True, kw_only=True)
class Smooth(Scaling):
    """Options of the method.

    Attributes:
        alpha: share of the inputs' range that moves, 0 .. 1.
        linear: also between two linear layers (v to o, up to down), as the paper's successors do.
        pow2: powers of two only, so that the rewritten model computes bit for bit the same in float.
    """

    alpha: float = 0.5
    linear: bool = False
    pow2: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise SchemeError(f"smooth: alpha={self.alpha:g} is a share, 0 <= alpha <= 1.")

    def takes(self, fold: NormFold | LinearFold) -> bool:  # noqa: D102
        return isinstance(fold, NormFold) or self.linear

    def factor(self, channel: Channel) -> Tensor:  # noqa: D102
        weight = torch.stack([w.abs().flatten(0, -2).amax(0) for w in channel.behind]).amax(0)
        alive = (channel.largest > 0) & (weight > 0)
        found = safe_factor(channel.largest**self.alpha / weight ** (1 - self.alpha), alive)
        return rounded_to_pow2(found) if self.pow2 else found


PART = Smooth
