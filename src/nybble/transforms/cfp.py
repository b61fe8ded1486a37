"""CBQ's pre-processing of activations: channels that stand apart from all others, and they alone, are scaled down.

Ding et al. 2023, arXiv:2312.07950. The largest magnitudes of the channels are split coarse to fine
(:mod:`nybble.scales.cfp`, which does the same to weights: ``scale=cfp``); an outlier channel is divided by

    s_i = sqrt(max|X_i| / largest reserved maximum)

in the norm before, and the weights that read it are multiplied by it. All other channels keep s = 1, so their weights
stay bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nybble.models.adapter import LinearFold, NormFold
from nybble.scales.cfp import check_lambdas, largest_reserved
from nybble.transforms._folds import Channel, Scaling, safe_factor


@dataclass(frozen=True, kw_only=True)
class Cfp(Scaling):
    """Options of the method.

    Attributes:
        coarse: how many interquartile ranges above the third quartile candidates begin.
        fine: weight of the spread of the channels that are kept, against the gap to the outliers.
        linear: also between two linear layers (v to o, up to down).
    """

    coarse: float = 1.5
    fine: float = 1.0
    linear: bool = False

    required: ClassVar[bool] = False  # no outliers is an answer too

    def __post_init__(self) -> None:
        check_lambdas(self.coarse, self.fine)

    def takes(self, fold: NormFold | LinearFold) -> bool:  # noqa: D102
        return isinstance(fold, NormFold) or self.linear

    def factor(self, channel: Channel) -> Tensor:  # noqa: D102
        cut = largest_reserved(channel.largest, self.coarse, self.fine)
        outlier = channel.largest > cut
        return safe_factor(torch.where(outlier, (channel.largest / cut).sqrt(), 1.0), channel.largest > 0)


PART = Cfp
