"""Channels between two linear layers mixed among themselves: permuted or rotated, as a function of the mix.

With M orthogonal, ``first`` becomes ``M first`` and ``second`` becomes ``second M^T``. Where attention lies between, it
weighs tokens and leaves the channels of a head alone, so M acts inside each key/value head; where an elementwise
function does, M is a permutation, and layers whose outputs meet those of ``first`` (a gate) are permuted along.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nybble.calibration.block import BlockState
from nybble.calibration.matrices import Matrices, Rewrite
from nybble.core.shapes import Float, Int64
from nybble.models.adapter import LinearFold, feeding_rows


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
    def of(fold: LinearFold, channels: int, config: Any, device: torch.device | str = "cpu") -> Places:
        """Of a pair's channels: heads where attention lies between, else all of them together.

        Args:
            fold: the pair.
            channels: that the second layer reads.
            config: the model's, for its heads.
            device: of the result.
        """
        width = channels // int(config.num_attention_heads) if fold.heads else channels
        blocks = feeding_rows(fold, config, channels).to(device).view(-1, width)
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


def mixing(state: BlockState, fold: LinearFold, places: Places, parameters: Mapping[str, Tensor]) -> Rewrite:
    """Mix the channels of a pair.

    Args:
        state: the block. The function looks at its float modules: call it while these stand there.
        fold: the pair.
        places: where its channels come from.
        parameters: ``order``, int64 [blocks, width], or ``rotation``, float32 [blocks, width, width] (orthogonal).
    """
    matrices = Matrices(state)
    makers = (fold.first, *fold.gates)
    biases = [bias for name in makers if (bias := matrices.bias(name)) is not None]

    def function(weights: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name in makers:
            found |= matrices.put(name, mixed_rows(matrices.get(name, weights), places, given))
        for bias in biases:
            found[bias] = mixed_rows(weights[bias][:, None], places, given)[:, 0]
        return found | matrices.put(fold.second, mixed_columns(matrices.get(fold.second, weights), places, given))

    names = [parameter for name in (*makers, fold.second) for parameter in matrices.parameters(name)]
    return Rewrite(weights=(*names, *biases), parameters=parameters, function=function)


def mixed_rows(matrix: Tensor, places: Places, given: Mapping[str, Tensor]) -> Tensor:
    """``M first``, [rows, columns]; rows that feed no channel (queries and keys of a fused projection) stay."""
    blocks = matrix[places.rows]
    if "order" in given:
        mixed = blocks.gather(1, given["order"][..., None].expand_as(blocks))
    else:
        mixed = given["rotation"] @ blocks
    return matrix.index_put((places.rows,), mixed)


def mixed_columns(matrix: Tensor, places: Places, given: Mapping[str, Tensor]) -> Tensor:
    """``second M^T``, [rows, channels]; of activations the same, in the new basis."""
    blocks = matrix.view(len(matrix), -1, places.rows.shape[1])
    if "order" in given:
        mixed = blocks.gather(2, given["order"][places.reads].expand_as(blocks))
    else:
        mixed = torch.einsum("obw,bvw->obv", blocks, given["rotation"][places.reads])
    return mixed.reshape(matrix.shape)
