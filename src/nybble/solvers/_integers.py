"""Which value of the grid each weight takes, scales and offsets given: a search over columns, then descent.

For one row it is ``min_v (w - s v - o) H (w - s v - o)^T`` over vectors of grid values: integer least squares, whose
exact solution takes time exponential in the columns. With U^T U = H^-1, U upper triangular in the order of the visits,
the error is a sum of squares over columns, each known once the columns before it are: ``e_j = (w_j - w_hat_j) / U_jj``,
then ``w_k -= e_j U_jk`` for all k > j (GPTQ, arXiv:2210.17323; Babai's nearest plane).

:func:`search` keeps the ``beam`` best beginnings of every row instead of one (the M-algorithm, Anderson & Mohan
1984): 1 is GPTQ's greedy visit; as many as a row has beginnings, and it is the exact optimum (of grids of up to 16
values; of finer ones the eight around each weight are looked at).
:func:`descend` then moves one value at a time to its best place with all others where they are (Behdin et al. 2023,
QuantEase, arXiv:2309.01885): the error of a row never rises, and where it ends no single change lowers it. For a
diagonal H both are rounding to nearest, the optimum.

Everything is float32 [groups, columns, rows]: a column is contiguous, and groups of rows (of a grouped convolution)
have an H each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.ops.blocks import divide
from nybble.ops.rounding import grid_table, round_to, round_to_codes
from nybble.qtensor import QuantParams, ScaleLike, block_view
from nybble.quantizer import Quantizer

_BLOCK = 128  # columns between two products with all that are left
_ALL, _AROUND = 16, 8  # values of a grid that a beam looks at: all of so many, or so many around a weight
_ELEMENTS = 1 << 25  # of the beams' copies of a weight, at a time


@dataclass(frozen=True)
class Levels:
    """The values that every weight may take: ``scale * v + offset``, v on the grid less the zero point.

    Attributes:
        quantizer: whose grid. scale, zero, offset: float32 [groups, columns, rows]; None where there is none.
    """

    quantizer: Quantizer
    scale: Tensor | None
    zero: Tensor | None
    offset: Tensor | None

    @staticmethod
    def of(quantizer: Quantizer, params: QuantParams, shape: tuple[int, int], groups: int) -> Levels:
        """From stored parameters of a weight [rows, columns]."""

        def spread(value: ScaleLike | None) -> Tensor | None:
            if value is None:
                return None
            view = quantizer.granularity
            like = view.to_blocks(torch.empty(shape, device="meta"))
            whole = view.from_blocks(block_view(value, view, shape).expand(like.shape), shape)
            return by_column(whole, groups)

        return Levels(quantizer, *(spread(p) for p in (params.scale, params.zero_point, params.offset)))

    def rows(self, start: int, stop: int) -> Levels:
        """Of some rows of each group."""
        return Levels(
            self.quantizer, *(None if t is None else t[..., start:stop] for t in (self.scale, self.zero, self.offset))
        )

    def nearest(self, w: Tensor, column: int | slice) -> Tensor:
        """The grid values nearest to weights of one column [..., groups, rows], or several, by the quantizer's rule."""
        y = w if self.offset is None else w - self.offset[:, column]
        y = y if self.scale is None else divide(y, self.scale[:, column], self.quantizer.reciprocal)
        fmt, rounding = self.quantizer.format, self.quantizer.rounding
        if self.zero is None:
            found: Tensor = round_to(y, fmt.name, rounding)
            return found
        zero = self.zero[:, column]
        return round_to_codes(y, zero.expand_as(y), fmt.min, fmt.max, rounding) - zero

    def near(self, w: Tensor, column: int) -> Tensor:
        """Grid values around weights of one column [beginnings, groups, rows]: [beginnings, values, groups, rows].

        All of them where there are no more than 16, else the eight around.
        """
        table = grid_table(self.quantizer.format.name, w.device)
        if len(table) <= _ALL:
            values = table.view(-1, 1, 1).expand(len(w), -1, *w.shape[1:])
        else:
            y = w if self.offset is None else w - self.offset[:, column]
            y = y if self.scale is None else divide(y, self.scale[:, column], self.quantizer.reciprocal)
            y = y if self.zero is None else y + self.zero[:, column]
            first = torch.searchsorted(table, y.contiguous()).clamp(_AROUND // 2, len(table) - _AROUND // 2)
            window = torch.arange(_AROUND, device=w.device).view(-1, 1, 1) - _AROUND // 2
            values = table[first[:, None] + window]
        return values if self.zero is None else values - self.zero[:, column]

    def dense(self, values: Tensor, column: int | slice) -> Tensor:
        """Weights of grid values [..., groups, rows] of one column, or [groups, columns, rows] of several."""
        values = values if self.scale is None else values * self.scale[:, column]
        return values if self.offset is None else values + self.offset[:, column]


def by_column(matrix: Tensor, groups: int) -> Tensor:
    """[rows, columns] as [groups, columns, rows / groups], contiguous."""
    return matrix.view(groups, -1, matrix.shape[1]).mT.contiguous()


def by_row(columns: Tensor) -> Tensor:
    """The inverse of :func:`by_column`."""
    return columns.mT.reshape(-1, columns.shape[1]).contiguous()


def search(target: Tensor, upper: Tensor, order: Tensor, levels: Levels, beam: int) -> Tensor:
    """Grid values by :attr:`beam` beginnings of every row at once; see the module.

    Args:
        target: the weights.
        upper: U, float32 [groups, columns, columns], its columns in ``order``.
        order: int64 [columns], of the visits, the same in every group.
        levels: of the grid.
        beam: how many beginnings are kept.

    Returns:
        like ``target``.
    """
    groups, columns, rows = target.shape
    most = max(1, _ELEMENTS // (groups * columns * beam))
    found = [
        _search_some(target[..., i : i + most], upper, order, levels.rows(i, i + most), beam)
        for i in range(0, rows, most)
    ]
    return torch.cat(found, -1) if len(found) > 1 else found[0]


def _search_some(target: Tensor, upper: Tensor, order: Tensor, levels: Levels, beam: int) -> Tensor:
    left, places = target[:, order][None], order.tolist()  # [beginnings, groups, columns, rows]
    cost = torch.zeros_like(left[:, :, 0])
    found = torch.zeros_like(left)
    for start in range(0, len(places), _BLOCK):
        stop = min(start + _BLOCK, len(places))
        part, inner = left[:, :, start:stop].clone(), upper[:, start:stop, start:stop]
        errors, chosen = torch.zeros_like(part), torch.zeros_like(part)
        origin = torch.arange(len(part), device=part.device)[:, None, None].expand_as(cost)
        for j in range(stop - start):
            w, pivot = part[:, :, j], inner[:, j, j, None]
            values, error = _options(w, pivot, places[start + j], levels, beam)
            total = cost[:, None] + error.square()  # [beginnings, values, groups, rows]
            if total.shape[0] * total.shape[1] == 1:
                cost = total[0]
                parent, values, error = None, values[:, 0], error[:, 0]
            else:
                flat = total.flatten(0, 1)
                cost, best = flat.topk(min(beam, len(flat)), dim=0, largest=False)
                parent = best // total.shape[1]
                values, error = values.flatten(0, 1).gather(0, best), error.flatten(0, 1).gather(0, best)
                part, errors, chosen = (_gathered(x, parent) for x in (part, errors, chosen))
                origin = origin.gather(0, parent)
            chosen[:, :, j], errors[:, :, j] = values, error
            part[:, :, j + 1 :] -= inner[:, j, j + 1 :, None] * error[:, :, None]
        if beam > 1:
            found, left = _gathered(found, origin), _gathered(left, origin)
        found[:, :, start:stop] = chosen
        if stop < len(places):
            left[:, :, stop:] -= upper[:, start:stop, stop:].mT @ errors
    best = cost.argmin(0, keepdim=True)
    back = torch.empty_like(target)
    back[:, order] = _gathered(found, best)[0]
    return back


def _options(w: Tensor, pivot: Tensor, column: int, levels: Levels, beam: int) -> tuple[Tensor, Tensor]:
    """Values of one column and their errors over the pivot, [beginnings, values, groups, rows]."""
    if beam == 1:
        values = levels.nearest(w, column)[:, None]
    else:
        values = levels.near(w, column)
    return values, (w[:, None] - levels.dense(values, column)) / pivot


def _gathered(x: Tensor, parent: Tensor) -> Tensor:
    """Beginnings [.., groups, columns, rows] of those that parents [.., groups, rows] point to."""
    return x.gather(0, parent[:, :, None].expand(-1, -1, x.shape[2], -1))


def descend(values: Tensor, target: Tensor, second: Tensor, levels: Levels, sweeps: int) -> Tensor:
    """Grid values that lose no more: one column after the other to its best value; see the module.

    Args:
        values: of the grid.
        target: the weights.
        second: H, [groups, columns, columns].
        levels: of the grid.
        sweeps: over all columns at most; fewer where one changes nothing.
    """
    values, columns = values.clone(), values.shape[1]
    for _ in range(sweeps):
        now = levels.dense(values, slice(None))
        slope, changed = second @ (target - now), False
        for start in range(0, columns, _BLOCK):
            stop = min(start + _BLOCK, columns)
            local, steps = slope[:, start:stop].clone(), torch.zeros_like(slope[:, start:stop])
            for j in range(start, stop):
                power, pull = second[:, j, j, None], local[:, j - start]
                best = levels.nearest(now[:, j] + pull / power, j)
                step = levels.dense(best, j) - now[:, j]
                falls = 2 * step * pull - step.square() * power > 1e-6 * step.square() * power  # beyond rounding
                values[:, j] = torch.where(falls, best, values[:, j])
                steps[:, j - start] = step = torch.where(falls, step, 0)
                local -= second[:, start:stop, j, None] * step[:, None]
            changed = changed or bool(steps.any())
            slope -= second[:, :, start:stop] @ steps
        if not changed:
            break
    return values
