"""Transforms that move factors through the pairs of weights of :mod:`nybble.calibration.folds`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nybble.calibration.folds import (
    Channel,
    Fold,
    channels_of,
    folds_of,
    one_a_row,
    scaling,
)
from nybble.calibration.matrices import Matrices, Rewrite
from nybble.calibration.window import Window
from nybble.models.adapter import Adapter
from nybble.transforms import Transform

__all__ = [
    "Channel", "Fold", "Matrices", "Scaling", "channels_of", "folds_of", "one_a_row", "rounded_to_pow2", "safe_factor",
    "scaling",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Scaling(Transform):
    """A transform that moves factors: what it multiplies each channel by is all that a method has to say.

    Attributes:
        moments: whether it looks at second moments of the channels.
    """

    moments: ClassVar[bool] = False

    @abstractmethod
    def takes(self, fold: Fold) -> bool:
        """Whether it works on this kind of pair."""

    @abstractmethod
    def factor(self, channel: Channel) -> Tensor:
        """``s``, what the channels are divided by before and multiplied by behind; float32 [channels], positive."""

    def works_on(self, adapter: Adapter, block: Any, config: Any) -> bool:
        return any(self.takes(fold) for fold in folds_of(adapter, block, config))

    def rewrites(self, window: Window, adapter: Adapter, path: str) -> Iterator[Rewrite]:
        folds = [f for f in folds_of(adapter, window.block.module, window.calibration.config) if self.takes(f)]
        for channel in channels_of(window, folds, path, self.moments):
            yield scaling(window.block, channel, self.factor(channel))


def safe_factor(factor: Tensor, alive: Tensor) -> Tensor:
    """``factor`` where channels are alive and it is a usable number, else 1 (dead channels move nothing)."""
    usable = alive & torch.isfinite(factor) & (factor > 0)
    return torch.where(usable, factor, torch.ones_like(factor)).clamp(1e-5, 1e5)


def rounded_to_pow2(factor: Tensor) -> Tensor:
    """The nearest power of two in the logarithm: such factors move through float weights without any rounding."""
    return torch.exp2(factor.log2().round())
