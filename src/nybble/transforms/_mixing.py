"""Transforms that mix the channels between two linear layers, by :mod:`nybble.calibration.mixing`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nybble.calibration.mixing import Places, mixing
from nybble.calibration.window import Window
from nybble.models.adapter import Adapter, LinearFold
from nybble.transforms import Rewrite, Transform
from nybble.transforms._folds import Channel, channels_of

__all__ = ["Mixing", "Places"]


@dataclass(frozen=True, kw_only=True)
class Mixing(Transform):
    """What a method has to say: on which pairs it works, and the parameters of the mix."""

    @abstractmethod
    def takes(self, fold: LinearFold) -> bool:
        """Whether it works on a pair."""

    @abstractmethod
    def parameters(self, channel: Channel, places: Places, seed: int) -> dict[str, Tensor]:
        """``order``, int64 [blocks, width], or ``rotation``, float32 [blocks, width, width] (orthogonal)."""

    def _folds(self, adapter: Adapter, block: Any, config: Any) -> list[LinearFold]:
        return [fold for fold in adapter.linear_folds_of(block, config) if self.takes(fold)]

    def works_on(self, adapter: Adapter, block: Any, config: Any) -> bool:
        return bool(self._folds(adapter, block, config))

    def rewrites(self, window: Window, adapter: Adapter, path: str) -> Iterator[Rewrite]:
        config = window.calibration.config
        for channel in channels_of(window, self._folds(adapter, window.block.module, config), path):
            assert isinstance(channel.fold, LinearFold) and channel.rows is not None
            places = Places.of(channel.fold, len(channel.rows), config, channel.rows.device)
            yield mixing(window.block, channel.fold, places, self.parameters(channel, places, window.calibration.seed))
