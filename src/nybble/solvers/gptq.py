"""GPTQ: quantize column by column, feed the error of each back into the columns that are left.

Frantar et al. 2022, arXiv:2210.17323. With H = E[x x^T] (damped) and U the upper Cholesky factor of H^-1, for column j
in order:

    q_j = Q(w_j)      e_j = (w_j - q_j) / U_jj      w_k -= e_j U_jk   for all k > j

Columns are done in blocks; within one only its own columns are updated, the rest once a block. The scales (and zero
points) of *every* group are fixed on the original weights before the first column is visited, so any format,
granularity and nesting of scales works, and codes of one group share what the file stores. (The original recomputes a
group's scale when it reaches the group; fixing them costs a little at large groups and is what makes activation order
and groups agree.)

``inputs: both`` makes up for what the inputs x have lost in earlier blocks, and in their own rounding, too (Li et al.
2025, GPTAQ, arXiv:2504.02692; Qronos, Zhang et al. 2025, arXiv:2505.11695): it aims at the least
``E|W x_float - W_hat x|^2``. That is ``tr((W_hat - T) H (W_hat - T)^T)`` and a constant, with the least-squares weights

    T = E[W x_float x^T] H^-1 = W + W E[(x_float - x) x^T] H^-1

so W + alpha (T - W) is rounded in place of W, and the grid fitted to it. (GPTAQ spreads what a column's input lost over
the columns behind it; T is the whole optimum, as in Qronos.) The same damped inverse serves both, so where inputs say
little T stays W. The share alpha is QEP's (Arai & Ichikawa 2025, arXiv:2504.09629): all of T fits what the calibration
data alone have lost, too, the more the fewer tokens there are. x is what the layer gets with those before it in place:
what these have made up for isn't made up for again.

``guided: g`` weighs what each token's outputs mean to the model's loss (Kim et al. 2025, GuidedQuant,
arXiv:2505.07004): neighbouring rows in g groups, and of each group an H of its own, ``E[g_k x x^T]`` with g_k the mean
over its rows of the loss's squared gradient by the output, from one backward pass of the float model. The labels of
that loss are drawn from the model itself, so that the squares estimate its Fisher information (GuidedQuant takes the
data's own next tokens; drawn ones need no labels, and serve every model with logits). Every row is rounded with its
group's H, in its order; with ``inputs: both`` T is still the plain least-squares one. Rows that g doesn't divide are in
the next fewer groups that do.

Damping: H + d mean(diag H) I with d = 0.01; a factorisation that still fails is retried with 10 times more, three
times, and then the layer falls back to round-to-nearest; each is noted. Inputs that are always zero get H_jj = 1: their
weights round to nearest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from nybble.calibration.error import RelativeError, relative_error
from nybble.core.errors import SchemeError
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer
from nybble.rounding import get_rounding
from nybble.solvers import Solved, Solver, Stats, Weight
from nybble.solvers._columns import visit_block, visit_block_in_graph
from nybble.solvers._factor import factorised, least_squares
from nybble.solvers._grid import Grid, stack


@dataclass(frozen=True, kw_only=True)
class Gptq(Solver):
    """Options of the method.

    Attributes:
        block: columns between two updates of the rest.
        damping: share of the mean diagonal that is added to H.
        activation_order: visit columns with large inputs first.
        inputs: ``both`` asks for the float network's outputs, as far as the quantized one's inputs allow; ``quantized``
            for what the float weights make of those.
        alpha: of ``both``, the share of the least-squares correction that the weights take before they are rounded.
        clip: give every block the clip value with the least error, each column weighted by its inputs' energy, where
            the scheme's rule is a plain maximum; false keeps the maximum. Rules that weigh (``stored``) do it
            themselves, with the columns' weights or, under false, without.
        guided: how many groups of rows have a second moment of their own, which gradients of the loss weigh; 0: all
            rows share the plain one.
    """

    path: ClassVar[str] = "quantized"

    block: int = 128
    damping: float = 0.01
    activation_order: bool = True
    inputs: Literal["quantized", "both"] = "quantized"
    alpha: float = 0.5
    clip: bool = True
    guided: int = 0

    def __post_init__(self) -> None:
        if self.block < 1:
            raise SchemeError(f"gptq: block={self.block}; at least one column.")
        if self.guided < 0:
            raise SchemeError(f"gptq: guided={self.guided} groups of rows; 0 leaves it out.")
        if not 0 <= self.damping < 1:
            raise SchemeError(f"gptq: damping={self.damping:g} is a share of the mean diagonal, 0 <= damping < 1.")
        if not 0 < self.alpha <= 1:
            raise SchemeError(f"gptq: alpha={self.alpha:g} is a share of the correction, 0 < alpha <= 1.")
        if self.inputs != "both" and self.alpha != type(self).alpha:
            raise SchemeError(
                f"gptq: alpha={self.alpha:g} says how much inputs: both corrects; add that, or leave it out."
            )

    def needs(self, inputs: Quantizer | None) -> frozenset[str]:  # noqa: D102
        drift = {"drift"} if self.inputs == "both" else set()
        return frozenset({"second_moment", *drift, *({"guided"} if self.guided else ())})

    @property
    def guides(self) -> int:  # noqa: D102
        return self.guided

    @property
    def paths(self) -> frozenset[str]:  # noqa: D102
        return frozenset({"float", "quantized"} if self.inputs == "both" else {"quantized"})

    def working_bytes(self, rows: Sequence[int], columns: int) -> int:
        """Five matrices like H while it is factorised, four beside what it is; then eight copies of all weights."""
        weights = 4 * columns * sum(rows)
        if self.inputs == "both":  # the targets and what they are made of
            weights = 3 * weights // 2
        return max(20 * columns**2 + 5 * weights // 2, 4 * columns**2 + 8 * weights)

    def quantizer_for(self, quantizer: Quantizer) -> Quantizer:  # noqa: D102
        if get_rounding(quantizer.rounding).stochastic:
            raise SchemeError(
                "gptq rounds to nearest; a stochastic rounding has no error to feed back. Use recipe rtn."
            )
        for word in ("center", "floor", "raw_scale"):
            if getattr(quantizer, word):
                raise SchemeError(
                    f"gptq can't round one column by itself under {word}=; leave it out, or use recipe rtn."
                )
        return quantizer

    def solve(self, weights: Sequence[Weight], stats: Stats) -> list[Solved]:  # noqa: D102
        alone = [weight for weight in weights if weight.name in stats.guided]
        found = {weight.name: self._solve_guided(weight, stats) for weight in alone}
        rest = [weight for weight in weights if weight.name not in found]
        found |= {w.name: each for w, each in zip(rest, self._solve(rest, stats) if rest else [], strict=True)}
        if self.guided and stats.second_moment is not None:
            plain = "no gradients of its outputs, token by token: solved as with guided=0"
            found |= {w.name: replace(found[w.name], notes=(*found[w.name].notes, plain)) for w in rest}
        return [found[weight.name] for weight in weights]

    def _solve(self, weights: Sequence[Weight], stats: Stats) -> list[Solved]:
        """Weights that share one second moment."""
        second, drift = stats.second_moment, stats.drift if self.inputs == "both" else None
        plain = [weight.quantizer.quantize(weight.matrix) for weight in weights]
        errors = [RelativeError(weight.matrix, second, drift) for weight in weights]
        plain_errors = [error.of(q.dequantize()) for error, q in zip(errors, plain, strict=True)]
        factor: tuple[Tensor, Tensor | None] | None = None
        notes: tuple[str, ...] = ("no calibration input reached it: rounded to nearest",)
        if second is not None:
            factor, notes = factorised(second, self.damping, self.activation_order)
        if second is None or factor is None:
            return [
                Solved(weight=q, error=e, rtn_error=e, notes=notes) for q, e in zip(plain, plain_errors, strict=True)
            ]
        upper, order = factor
        if self.inputs == "both" and drift is None:
            notes = (*notes, _UNPAIRED)
        targets = weights
        if drift is not None:
            targets = [
                replace(w, matrix=least_squares(w.matrix, self.alpha * drift.cross, upper, order)) for w in weights
            ]
        energy = second.diagonal(dim1=-2, dim2=-1) if self.clip else None
        grids = [Grid(weight, energy) for weight in targets]
        rounded = self._visit(grids, upper, order) if upper.dim() == 2 else self._visit_groups(grids, upper)
        del factor, upper  # as large as the second moment
        solved = []
        for grid, columns, measure, base, base_error in zip(grids, rounded, errors, plain, plain_errors, strict=True):
            found = grid.finish(columns)
            solved.append(_better(found, measure.of(found.dequantize()), base, base_error, notes))
        return solved

    def _solve_guided(self, weight: Weight, stats: Stats) -> Solved:
        """A weight whose groups of rows have second moments of their own; the grid is one for all of it."""
        guided, base, notes = stats.guided[weight.name], weight.quantizer.quantize(weight.matrix), list[str]()
        aim = weight
        if self.inputs == "both" and stats.drift is None:
            notes.append(_UNPAIRED)
        elif self.inputs == "both" and stats.drift is not None and stats.second_moment is not None:
            shared, said = factorised(stats.second_moment, self.damping, self.activation_order)
            notes += said
            if shared is not None:
                aim = replace(weight, matrix=least_squares(weight.matrix, self.alpha * stats.drift.cross, *shared))
        base_error = relative_error(aim.matrix, base.dequantize(), guided)
        grid = Grid(aim, guided.diagonal(dim1=-2, dim2=-1) if self.clip else None)
        rows, rounded = len(weight.matrix) // len(guided), []
        for number, moment in enumerate(guided):
            factor, said = factorised(moment, self.damping, self.activation_order)
            notes += [note for note in said if note not in notes]
            if factor is None:
                return Solved(weight=base, error=base_error, rtn_error=base_error, notes=tuple(notes))
            rounded += self._visit([grid.part(slice(number * rows, (number + 1) * rows))], *factor)
        found = grid.finish(torch.cat(rounded))
        error = relative_error(aim.matrix, found.dequantize(), guided)
        notes.append(f"errors weighed by gradients of the loss, in {len(guided)} groups of rows")
        return _better(found, error, base, base_error, tuple(notes))

    def _visit_groups(self, grids: Sequence[Grid], uppers: Tensor) -> list[Tensor]:
        """As :meth:`_visit` where every group of rows has its own factor, [groups, columns, columns]: all at once."""
        found = []
        for grid in grids:
            left, (span,) = grid.matrix.T.contiguous(), stack([grid])
            by_row = uppers.repeat_interleave(left.shape[1] // len(uppers), 0).permute(1, 2, 0)
            result, divisor = torch.empty_like(left), span.divisor()
            for j in range(len(left)):
                result[j] = span.round_column(left[j], j, divisor)
                left[j + 1 :] -= by_row[j, j + 1 :] * ((left[j] - result[j]) / by_row[j, j])
            found.append(result.T.contiguous())
        return found

    def _visit(self, grids: Sequence[Grid], upper: Tensor, order: Tensor | None) -> list[Tensor]:
        """Run over the columns of all weights at once, rows stacked; returns the rounded matrices [rows, columns].

        Works on the transpose, so that a column is contiguous.
        """
        spans = stack(grids)
        for grid in grids:
            grid.let_go()
        left = torch.cat([grid.matrix for grid in grids]).T.contiguous()
        if order is not None:
            left, spans = left[order], [span.ordered(order) for span in spans]
        columns = left.shape[0]
        result = torch.empty_like(left)
        visit = visit_block_in_graph if left.is_cuda else visit_block
        for start in range(0, columns, self.block):
            stop = min(start + self.block, columns)
            errors = visit(
                left[start:stop],
                upper[start:stop, start:stop],
                [s.columns(start, stop) for s in spans],
                result[start:stop],
            )
            if stop < columns:
                left[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
        del left, spans
        if order is not None:
            back = torch.empty_like(result)
            back[order] = result
            result = back
            del back
        ends = torch.tensor([grid.matrix.shape[0] for grid in grids]).cumsum(0).tolist()
        return [
            result[:, end - grid.matrix.shape[0] : end].T.contiguous() for grid, end in zip(grids, ends, strict=True)
        ]


_UNPAIRED = "no float inputs to compare with, token by token: solved as with inputs=quantized"


def _better(found: BlockQTensor, error: float, base: BlockQTensor, base_error: float, notes: tuple[str, ...]) -> Solved:
    """What was found, or what rounding to nearest gives where that loses less."""
    if error > base_error:
        kept = (*notes, f"worse than round-to-nearest ({error:.3g} > {base_error:.3g}): kept the latter")
        return Solved(weight=base, error=base_error, rtn_error=base_error, notes=kept)
    return Solved(weight=found, error=error, rtn_error=base_error, notes=notes)


PART = Gptq
