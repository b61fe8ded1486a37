"""Channels between two linear layers in the order of their magnitude: neighbours, which share a scale, are alike then.

Exact: a permutation of the first layer's rows and of the second's columns. It is the idea behind RPTQ (Yuan et al.
2023, arXiv:2304.01089, who cluster the channels of activations) and K-sort, here for the inputs of attention's output
projection (inside each head) and of an MLP's second layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nybble.models.adapter import LinearFold
from nybble.transforms._folds import Channel
from nybble.transforms._mixing import Mixing, Places


@dataclass(frozen=True, kw_only=True)
class Permute(Mixing):
    """``by``: order by the largest magnitude of the ``inputs`` that calibration saw, or of the ``weights`` behind."""

    by: Literal["inputs", "weights"] = "inputs"

    def takes(self, fold: LinearFold) -> bool:  # noqa: D102
        return True

    def parameters(self, channel: Channel, places: Places, seed: int) -> dict[str, Tensor]:  # noqa: D102
        size = channel.largest
        if self.by == "weights":
            size = torch.stack([w.abs().flatten(0, -2).amax(0) for w in channel.behind]).amax(0)
        return {"order": places.by_block(size).argsort(dim=1, descending=True, stable=True)}


PART = Permute
