"""The grid that a weight is rounded to column by column, fixed before the first one, and grids of several weights."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from nybble.qtensor import QuantParams, ScaleLike, block_view
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer
from nybble.scales.absmax import AbsMax
from nybble.scales.minmax import MinMax
from nybble.solvers import Weight
from nybble.solvers._columns import Span

CLIP = "low=0.6,high=1.1,grid=11"


class Grid:
    """The fixed grid of one weight: its quantizer's parameters, spread over the columns.

    Args:
        weight: what is rounded, and to what.
        energy: of each column's inputs, float32 [columns] or of groups of rows [groups, columns]: weighs the errors of
            clip values, which are searched then; None: the plain range, where the rule doesn't weigh by itself.
    """

    def __init__(self, weight: Weight, energy: Tensor | None) -> None:
        self.matrix, self.quantizer = weight.matrix, weight.quantizer
        if energy is not None and energy.dim() == 2:
            energy = energy.repeat_interleave(len(self.matrix) // len(energy), 0)
        searched = None if energy is None else _searched(self.quantizer)
        used = searched or self.quantizer
        weighed = searched is not None or used.scale.weighs
        self.params: QuantParams = used.fit(self.matrix, energy if weighed else None)
        self.scale = self._spread(self.params.scale)
        self.zero = self._spread(self.params.zero_point)
        self.offset = self._spread(self.params.offset)

    def part(self, rows: slice) -> Grid:
        """The same grid of some rows."""
        made = copy.copy(self)
        made.matrix = self.matrix[rows]
        for name in ("scale", "zero", "offset"):
            value = getattr(self, name)
            setattr(made, name, None if value is None else value[:, rows].contiguous())
        return made

    def let_go(self) -> None:
        """Of what was spread over the columns, which is as large as the weight; :meth:`finish` reads none of it."""
        self.scale = self.zero = self.offset = None

    @property
    def kind(self) -> tuple[object, ...]:
        """Weights of one kind are rounded together."""
        q = self.quantizer
        return q.format, q.rounding, q.reciprocal, self.scale is None, self.zero is None, self.offset is None

    def _spread(self, value: ScaleLike | None) -> Tensor | None:
        """[columns, rows], contiguous."""
        if value is None:
            return None
        granularity, shape = self.quantizer.granularity, tuple(self.matrix.shape)
        blocks = granularity.to_blocks(self.matrix)
        wide = block_view(value, granularity, shape).expand_as(blocks)
        return granularity.from_blocks(wide, shape).T.contiguous()

    def finish(self, matrix: Tensor) -> BlockQTensor:
        """``matrix`` (anything, or already on the grid) as a QTensor with these parameters."""
        return self.quantizer.quantize(matrix, self.params)


def stack(grids: Sequence[Grid]) -> list[Span]:
    """Spans over the stacked rows of all weights; neighbours of one kind share one."""
    spans: list[Span] = []
    start = 0
    for _, run in itertools.groupby(grids, key=lambda grid: grid.kind):
        members = list(run)
        stop = start + sum(grid.matrix.shape[0] for grid in members)
        parts = [[getattr(grid, name) for grid in members] for name in ("scale", "zero", "offset")]
        joined = [None if tensors[0] is None else torch.cat(tensors, 1) for tensors in parts]
        spans.append(Span(slice(start, stop), members[0].quantizer, *joined))
        start = stop
    return spans


def _searched(quantizer: Quantizer) -> Quantizer | None:
    """The quantizer with clip values searched, or None where its scale rule isn't a plain maximum of a block."""
    scale = quantizer.scale
    plain = isinstance(scale, AbsMax) or (isinstance(scale, MinMax) and not scale.has_offset)
    if quantizer.granularity.factored or not plain:
        return None
    return quantizer.replace(scale=f"mse({CLIP},asymmetric={str(scale.needs_integer).lower()})")
