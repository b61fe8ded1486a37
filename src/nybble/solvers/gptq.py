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

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from nybble.calibration.error import RelativeError, by_group, relative_error
from nybble.core.errors import SchemeError
from nybble.qtensor import QuantParams, ScaleLike, block_view
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer
from nybble.rounding import get_rounding
from nybble.scales.absmax import AbsMax
from nybble.scales.minmax import MinMax
from nybble.solvers import Solved, Solver, Stats, Weight
from nybble.solvers._columns import Span, visit_block, visit_block_in_graph

CLIP = "low=0.6,high=1.1,grid=11"


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
            factor, notes = self._factor(second)
        if second is None or factor is None:
            return [
                Solved(weight=q, error=e, rtn_error=e, notes=notes) for q, e in zip(plain, plain_errors, strict=True)
            ]
        upper, order = factor
        if self.inputs == "both" and drift is None:
            notes = (*notes, _UNPAIRED)
        targets = weights
        if drift is not None:
            targets = [replace(w, matrix=_target(w.matrix, self.alpha * drift.cross, upper, order)) for w in weights]
        energy = second.diagonal(dim1=-2, dim2=-1) if self.clip else None
        grids = [_Grid(weight, energy) for weight in targets]
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
            shared, said = self._factor(stats.second_moment)
            notes += said
            if shared is not None:
                aim = replace(weight, matrix=_target(weight.matrix, self.alpha * stats.drift.cross, *shared))
        base_error = relative_error(aim.matrix, base.dequantize(), guided)
        grid = _Grid(aim, guided.diagonal(dim1=-2, dim2=-1) if self.clip else None)
        rows, rounded = len(weight.matrix) // len(guided), []
        for number, moment in enumerate(guided):
            factor, said = self._factor(moment)
            notes += [note for note in said if note not in notes]
            if factor is None:
                return Solved(weight=base, error=base_error, rtn_error=base_error, notes=tuple(notes))
            rounded += self._visit([grid.part(slice(number * rows, (number + 1) * rows))], *factor)
        found = grid.finish(torch.cat(rounded))
        error = relative_error(aim.matrix, found.dequantize(), guided)
        notes.append(f"errors weighed by gradients of the loss, in {len(guided)} groups of rows")
        return _better(found, error, base, base_error, tuple(notes))

    def _factor(self, second_moment: Tensor) -> tuple[tuple[Tensor, Tensor | None] | None, tuple[str, ...]]:
        """Upper Cholesky factor of the damped inverse, the order of columns, and notes; None if no damping helped.

        Of moments [groups, columns, columns] all factors at once; their columns stay in their order.
        """
        diagonal = second_moment.diagonal(dim1=-2, dim2=-1).clone()
        dead = diagonal == 0
        diagonal[dead] = 1
        notes = [f"{int(dead.sum())} inputs are always zero"] if bool(dead.any()) else []
        grouped = diagonal.dim() > 1
        order = diagonal.argsort(descending=True, stable=True) if self.activation_order and not grouped else None
        ordered = diagonal if order is None else diagonal[order]
        mean = ordered.mean(-1)
        damping = torch.full_like(mean, self.damping)
        for attempt in range(4):
            # With its rows and columns reversed, H = M M^T for an upper M, and H^-1 = U^T U for U = M^-1: no inverse,
            # and one factorisation less than chol(H^-1). As few as can be of these matrices are there at once.
            damped = ordered + (damping * mean)[..., None]
            reversed_lower, info = torch.linalg.cholesky_ex(_reversed(second_moment, order, damped))
            failed = info != 0
            m = reversed_lower.flip(-2, -1)
            del reversed_lower
            identity = torch.eye(diagonal.shape[-1], dtype=diagonal.dtype, device=diagonal.device)
            if bool(failed.any()):
                m = torch.where(failed[..., None, None], identity, m)
            upper = torch.linalg.solve_triangular(m, identity.expand_as(m), upper=True)
            del m, identity
            failed = failed | ~torch.isfinite(upper).all(-1).all(-1)
            if not bool(failed.any()):
                if attempt:
                    notes.append(f"damping raised to {float(damping.max()):g}")
                return (upper, order), tuple(notes)
            damping = torch.where(failed, damping.clamp_min(1e-4) * 10, damping)
        notes.append(
            f"the second moment can't be factorised even with damping {float(damping.max()) / 10:g}: rounded to nearest"
        )
        return None, tuple(notes)

    def _visit_groups(self, grids: Sequence[_Grid], uppers: Tensor) -> list[Tensor]:
        """As :meth:`_visit` where every group of rows has its own factor, [groups, columns, columns]: all at once."""
        found = []
        for grid in grids:
            left, (span,) = grid.matrix.T.contiguous(), _stack([grid])
            by_row = uppers.repeat_interleave(left.shape[1] // len(uppers), 0).permute(1, 2, 0)
            result, divisor = torch.empty_like(left), span.divisor()
            for j in range(len(left)):
                result[j] = span.round_column(left[j], j, divisor)
                left[j + 1 :] -= by_row[j, j + 1 :] * ((left[j] - result[j]) / by_row[j, j])
            found.append(result.T.contiguous())
        return found

    def _visit(self, grids: Sequence[_Grid], upper: Tensor, order: Tensor | None) -> list[Tensor]:
        """Run over the columns of all weights at once, rows stacked; returns the rounded matrices [rows, columns].

        Works on the transpose, so that a column is contiguous.
        """
        spans = _stack(grids)
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


def _target(matrix: Tensor, cross: Tensor, upper: Tensor, order: Tensor | None) -> Tensor:
    """``W + W C H^-1``; for C = E[d x^T] the weights that give the float outputs best on these inputs.

    Args:
        matrix: W, float32 [rows, columns].
        cross: C, float32 [columns, columns], or [groups, columns, columns].
        upper: U with U^T U = H^-1, its columns in ``order``.
        order: int64 [columns], or None.
    """
    lacking = by_group(matrix, cross) @ cross
    if order is not None:
        lacking = lacking[:, order]
    moved = lacking @ upper.mT @ upper
    if order is not None:
        moved = torch.empty_like(moved).index_copy_(1, order, moved)
    return matrix + moved.reshape(matrix.shape)


def _reversed(second_moment: Tensor, order: Tensor | None, diagonal: Tensor) -> Tensor:
    """The second moment with its columns in order, and that reversed, and another diagonal (in order)."""
    if order is None:
        h = second_moment.flip(-2, -1)
    else:
        back = order.flip(0)
        h = second_moment.index_select(0, back).index_select(1, back)
    h.diagonal(dim1=-2, dim2=-1).copy_(diagonal.flip(-1))
    return h


class _Grid:
    """The fixed grid of one weight: its quantizer's parameters, spread over the columns."""

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

    def part(self, rows: slice) -> _Grid:
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


def _searched(quantizer: Quantizer) -> Quantizer | None:
    """The quantizer with clip values searched, or None where its scale rule isn't a plain maximum of a block."""
    scale = quantizer.scale
    plain = isinstance(scale, AbsMax) or (isinstance(scale, MinMax) and not scale.has_offset)
    if quantizer.granularity.factored or not plain:
        return None
    return quantizer.replace(scale=f"mse({CLIP},asymmetric={str(scale.needs_integer).lower()})")


def _stack(grids: Sequence[_Grid]) -> list[Span]:
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


PART = Gptq
