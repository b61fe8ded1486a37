"""decoupleQ: grid values and scales (with offsets) as two sets of unknowns, solved in turns; no rule ties the two.

Guo et al. 2024, "decoupleQ: Towards 2-bit Post-Training Uniform Quantization via decoupling Parameters into Integer and
Floating Points", arXiv:2404.12759, stage one. For a weight W whose inputs have the second moment H it is constrained
least squares,

    min over V, S, O   tr((W - S V - O) H (W - S V - O)^T)      V on the grid, one scale and one offset a block

    1. begin with each block's range at the share that loses least by rounding
    2. V for these S and O: columns one by one, large inputs first, the error of each fed back into those that are left
       (the paper's second approximation, GPTQ's update), or ``beam`` beginnings at once; then value by value to its
       best place with all others where they are, ``sweeps`` times at most
    3. S and O for this V in closed form, all blocks of a row together
    4. 2 and 3 again, ``rounds`` in all, or until fewer than one row in 10,000 gains

Turns end in a local optimum; ``starts`` begins at other shares too (the whole range, and less), and rows that share
scales keep what was best for them: for layers of a few columns, whose optimum is then near.

A row takes new grid values, and rows that share scales new scales, only where they lose less as stored, so the error
never rises. Of a diagonal H step 2 is exact; of any H where ``beam`` has room for every beginning of a row (formats of
up to 4 bits).

S and O are real numbers in the paper, so an integer zero point becomes an offset (``symmetric=false`` is solved as
``scale=minmax(offset=true)`` over all codes); ``offsets: false`` keeps zero points, and moves them by whole steps.

Where we differ: any scalar format and granularity. In step 1 each block has a share of its own, by the diagonal of H
(the paper: a row's, by all of H, from the second round on). Descent in place of the paper's projected gradient (its
first approximation), whose aim is the same: less error than GPTQ's greedy visit. Scales stay positive; with an offset
nothing is lost by it where a grid is its own mirror image. Scales coarser than 16 bits (NVFP4, MX) are then visited
block by block as they are stored, what one loses made up for by the next. One damping, raised until H + d mean(diag H)
factorises, serves every step and the acceptance. Where no scale a block is kept (``rank1``, ``scale=one``) step 2 is
all there is.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from nybble.calibration.error import relative_error
from nybble.core.errors import SchemeError
from nybble.quantizer import Quantizer
from nybble.rounding import get_rounding
from nybble.solvers import Solved, Solver, Stats, Weight
from nybble.solvers._fitted import Fitted
from nybble.solvers._integers import by_column, by_row, descend, search

_FEW = 1e-4  # of all rows: when no more of them gain, it ends
_SHARES = torch.linspace(0.2, 1.0, 33)


@dataclass(frozen=True, kw_only=True)
class DecoupleQ(Solver):
    """Options of the method.

    Attributes:
        rounds: of both steps, at most. starts: how many shares of the range it begins at.
        beam: beginnings of a row that the search keeps; 1 is GPTQ.
        sweeps: of the descent, at most; 0 leaves it out.
        damping: share of the mean diagonal that is added to H.
        offsets: let a real offset stand for an integer zero point; false keeps zero points.
        guided: how many groups of rows have a second moment of their own, which gradients of the loss weigh (as of
            gptq); 0: all rows share the plain one.
    """

    path: ClassVar[str] = "quantized"

    rounds: int = 4
    starts: int = 1
    beam: int = 1
    sweeps: int = 4
    damping: float = 0.01
    offsets: bool = True
    guided: int = 0

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("starts", 1), ("beam", 1), ("sweeps", 0), ("guided", 0)):
            if getattr(self, name) < least:
                raise SchemeError(f"decoupleq: {name}={getattr(self, name)}; at least {least}.")
        if not 0 <= self.damping < 1:
            raise SchemeError(f"decoupleq: damping={self.damping:g} is a share of the mean diagonal, 0 <= damping < 1.")

    def needs(self, inputs: Quantizer | None) -> frozenset[str]:  # noqa: D102
        return frozenset({"second_moment", "guided"} if self.guided else {"second_moment"})

    def trial(self) -> DecoupleQ:  # noqa: D102
        return replace(self, rounds=1, starts=1, beam=1, sweeps=0)

    @property
    def guides(self) -> int:  # noqa: D102
        return self.guided

    def quantizer_for(self, quantizer: Quantizer) -> Quantizer:
        """With a real offset in place of an integer zero point, where ``offsets`` says so."""
        if get_rounding(quantizer.rounding).stochastic:
            raise SchemeError(
                f"decoupleq decides every value itself, and {quantizer} draws them; use rounding=nearest-even."
            )
        for word in ("center", "floor", "raw_scale"):
            if getattr(quantizer, word):
                raise SchemeError(
                    f"decoupleq can't solve {quantizer}: under {word}= a value isn't scale times a level of the grid, "
                    "and offset; leave it out, or use recipe rtn."
                )
        if not self.offsets or not quantizer.scale.needs_integer:
            return quantizer
        rest = str(quantizer.replace(scale="minmax(offset=true)")).partition(" ")[2]
        return Quantizer(f"{quantizer.format.name} {rest}")  # all codes: int4 alone would leave -8 out

    def working_bytes(self, rows: Sequence[int], columns: int) -> int:
        """H and its factors, in float64 too; of the largest weight the beginnings, and a dozen copies."""
        return 48 * columns**2 + 4 * columns * (sum(rows) + (14 + 4 * self.beam) * max(rows)) + (1 << 28)

    def flops(self, rows: int, columns: int, tokens: int, inputs: Quantizer | None) -> float:
        """Of every round a search, the sweeps of the descent, three products with H, one more in float64 (twice)."""
        return 2.0 * self.starts * self.rounds * (self.beam + 2 * self.sweeps + 8) * rows * columns**2

    def solve(self, weights: Sequence[Weight], stats: Stats) -> list[Solved]:  # noqa: D102
        second, notes = stats.second_moment, tuple[str, ...]()
        if second is None:
            notes = ("no calibration input reached it: its inputs count alike",)
        shared = None
        if any(weight.name not in stats.guided for weight in weights):
            shared = self._factor(weights[0].matrix, second)
        solved = []
        for weight in weights:
            own = stats.guided.get(weight.name)
            if own is not None:
                said = (*notes, f"errors weighed by gradients of the loss, in {len(own)} groups of rows")
                solved.append(self._solve(weight, own, self._factor(weight.matrix, own), said))
            else:
                assert shared is not None
                solved.append(self._solve(weight, second, shared, notes))
        return solved

    def _factor(self, like: Tensor, second: Tensor | None) -> tuple[Tensor, Tensor, Tensor, tuple[str, ...]]:
        """H damped [groups, columns, columns], U with U^T U = H^-1 in the order of the visits, the order, notes."""
        columns = like.shape[1]
        h = torch.eye(columns, dtype=like.dtype, device=like.device) if second is None else second.clone()
        h = h.reshape(-1, columns, columns)
        mean = h.diagonal(dim1=-2, dim2=-1).mean(-1)
        mean = torch.where(mean > 0, mean, 1.0)
        damping, identity = torch.full_like(mean, self.damping), torch.eye(columns, dtype=h.dtype, device=h.device)
        order = h.diagonal(dim1=-2, dim2=-1).mean(0).argsort(descending=True, stable=True)
        raised = False
        for _ in range(12):
            damped = h + (damping * mean)[:, None, None] * identity
            flipped = damped[:, order][:, :, order].flip(-2, -1)
            lower, info = torch.linalg.cholesky_ex(flipped)
            upper = torch.linalg.solve_triangular(lower.flip(-2, -1), identity.expand_as(h), upper=True)
            failed = (info != 0) | ~torch.isfinite(upper).all(-1).all(-1)
            if not bool(failed.any()):
                break
            raised, damping = True, torch.where(failed, damping.clamp_min(1e-4) * 10, damping)
        return damped, upper, order, (f"damping raised to {float(damping.max()):g}",) if raised else ()

    def _solve(
        self,
        weight: Weight,
        second: Tensor | None,
        factor: tuple[Tensor, Tensor, Tensor, tuple[str, ...]],
        notes: tuple[str, ...],
    ) -> Solved:
        matrix, plain = weight.matrix, weight.quantizer.quantize(weight.matrix)
        plain_error = relative_error(matrix, plain.dequantize(), second)
        quantizer, (damped, upper, order, said) = self.quantizer_for(weight.quantizer), factor
        fitted = Fitted(matrix, damped, quantizer, quantizer.quantize(matrix))
        self.begin_and_alternate(fitted, upper, order)
        found = fitted.packed()
        error = relative_error(matrix, found.dequantize(), second)
        if not error <= plain_error:
            kept = f"worse than round-to-nearest ({error:.3g} > {plain_error:.3g}): kept the latter"
            return Solved(weight=plain, error=plain_error, rtn_error=plain_error, notes=(*notes, *said, kept))
        chosen = None if quantizer == weight.quantizer else quantizer
        return Solved(weight=found, error=error, rtn_error=plain_error, quantizer=chosen, notes=(*notes, *said))

    def begin_and_alternate(self, fitted: Fitted, upper: Tensor, order: Tensor) -> None:
        """All steps, from every start; arguments as :meth:`alternate`, with what rounding to nearest gives."""
        others = [copy.copy(fitted) for _ in range(self.starts - 1)] if fitted.movable else []
        if fitted.movable:
            fitted.shrink(_SHARES)
        self.alternate(fitted, upper, order)
        for share, other in zip(torch.linspace(1.0, 0.4, len(others)), others, strict=True):
            other.shrink(share[None])
            self.alternate(other, upper, order)
            fitted.better(other)

    def alternate(self, fitted: Fitted, upper: Tensor, order: Tensor) -> list[float]:
        """Steps 2 to 4 on a weight; the error as it began, and after every round.

        Args:
            fitted: as step 1 left it.
            upper: U, float32 [groups, columns, columns], U^T U = H^-1 with its columns in ``order``.
            order: of the visits, int64 [columns].
        """
        target, before = by_column(fitted.target, len(upper)), fitted.errors()
        totals = [float(before.sum())]
        for _ in range(self.rounds):
            levels = fitted.levels()
            fitted.take(by_row(search(target, upper, order, levels, self.beam)))
            if self.sweeps:
                values = by_column(fitted.values, len(upper))
                fitted.take(by_row(descend(values, target, fitted.second, levels, self.sweeps)))
            if fitted.movable:
                fitted.solve()
            if fitted.movable and fitted.coarse:
                fitted.sweep()
            after = fitted.errors()
            totals.append(float(after.sum()))
            if float((after < before).float().mean()) < _FEW:
                break
            before = after
        return totals


PART = DecoupleQ
