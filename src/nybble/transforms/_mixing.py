"""Transforms that mix the channels between two linear layers among themselves: permutations and rotations.

With M orthogonal, ``first`` becomes ``M first`` and ``second`` becomes ``second M^T``. Where attention lies between, it
weighs tokens and leaves the channels of a head alone, so M acts inside each key/value head; where an elementwise
function does, M is a permutation, and layers whose outputs meet those of ``first`` (a gate) are permuted along.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nybble.calibration.block import BlockState
from nybble.calibration.window import Window
from nybble.core.shapes import Float, Int64
from nybble.models.adapter import Adapter, LinearFold
from nybble.transforms import Rewrite, Transform
from nybble.transforms._folds import Channel, Matrices, channels_of


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the channels of a pair come from.

    Attributes:
        rows: int64 [blocks, width]: rows of the first weight that may be mixed among themselves, a block each.
        reads: for each block of ``width`` channels of the second weight, the block of rows that feeds it.
    """

    rows: Int64[Tensor, "blocks width"]
    reads: Int64[Tensor, " readers"]

    @staticmethod
    def of(channel: Channel, config: Any) -> Places:
        """Of a pair's channels: heads where attention lies between, else all of them together."""
        assert isinstance(channel.fold, LinearFold) and channel.rows is not None
        channels = len(channel.rows)
        width = channels // int(config.num_attention_heads) if channel.fold.heads else channels
        blocks = channel.rows.view(-1, width)
        made = torch.unique(blocks[:, 0])
        reads = torch.bucketize(blocks[:, 0].contiguous(), made)
        first = torch.stack([(reads == block).nonzero()[0, 0] for block in range(len(made))])
        return Places(rows=blocks[first], reads=reads)

    def by_block(self, values: Float[Tensor, " channels"]) -> Float[Tensor, "blocks width"]:
        """Values of channels [channels] as [blocks, width]: the largest over the channels that one row feeds."""
        width = self.rows.shape[1]
        index = self.reads[:, None].expand(-1, width)
        empty = values.new_zeros(self.rows.shape)
        return empty.scatter_reduce(0, index, values.view(-1, width), "amax")


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
            places = Places.of(channel, config)
            yield mixing(window.block, channel, places, self.parameters(channel, places, window.calibration.seed))


def mixing(state: BlockState, channel: Channel, places: Places, parameters: Mapping[str, Tensor]) -> Rewrite:
    """Mix the channels of a pair; ``parameters`` as :meth:`Mixing.parameters` gives them."""
    matrices, fold = Matrices(state), channel.fold
    assert isinstance(fold, LinearFold)
    makers = (fold.first, *fold.gates)
    biases = [bias for name in makers if (bias := matrices.bias(name)) is not None]

    def function(weights: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name in makers:
            found |= matrices.put(name, _mixed_rows(matrices.get(name, weights), places, given))
        for bias in biases:
            found[bias] = _mixed_rows(weights[bias][:, None], places, given)[:, 0]
        return found | matrices.put(fold.second, _mixed_columns(matrices.get(fold.second, weights), places, given))

    names = [parameter for name in (*makers, fold.second) for parameter in matrices.parameters(name)]
    return Rewrite(weights=(*names, *biases), parameters=parameters, function=function)


def _mixed_rows(matrix: Tensor, places: Places, given: Mapping[str, Tensor]) -> Tensor:
    """``M first``; rows that feed no channel (queries and keys of a fused projection) stay."""
    blocks = matrix[places.rows]
    if "order" in given:
        mixed = blocks.gather(1, given["order"][..., None].expand_as(blocks))
    else:
        mixed = given["rotation"] @ blocks
    return matrix.index_put((places.rows,), mixed)


def _mixed_columns(matrix: Tensor, places: Places, given: Mapping[str, Tensor]) -> Tensor:
    """``second M^T``."""
    blocks = matrix.view(len(matrix), -1, places.rows.shape[1])
    if "order" in given:
        mixed = blocks.gather(2, given["order"][places.reads].expand_as(blocks))
    else:
        mixed = torch.einsum("obw,bvw->obv", blocks, given["rotation"][places.reads])
    return mixed.reshape(matrix.shape)
