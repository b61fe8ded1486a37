"""Half-quadratic quantization: a few steps on the weights alone that move what a block's grid is shifted or scaled by.

Badri & Shaji 2023 (https://mobiusml.github.io/hqq_blog). With Q the rounding to the grid, it minimises
``|W - W_hat|_p^p``, p < 1, which forgives the few large errors of outliers, by splitting the error off:

    E <- shrink(W - W_hat),  shrink(e) = sign(e) max(0, |e| - |e|^(p-1) / beta)
    o <- mean over the block of  W - E - S v            v = Q((W - o) / S),  W_hat = S v + o

S is the range's, as min-max finds it, and stays. ``o`` is real, so an integer zero point becomes an offset
(``symmetric=false`` is solved as ``scale=minmax(offset=true)`` over all codes of the format). Steps end when the mean
magnitude of the error over the whole weight falls no more; as in the library, the offset that this last step found is
kept. Its default loop takes kappa = 1.01 and never multiplies beta with it, so 1 is the default here.

Where the quantizer has no offset, the same split moves the scale: ``S <- <v, W - E> / <v, v>``, and each block takes
the scale as it will be stored only where its squared error is lower for it. Where a weight comes out worse than
round-to-nearest in squared error (what the report shows), that is kept, and the report says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nybble.calibration.error import relative_error
from nybble.core.errors import SchemeError
from nybble.ops.blocks import divide
from nybble.ops.grid import Grid
from nybble.qtensor import QuantParams, block_view
from nybble.quantizer import Quantizer
from nybble.rounding import get_rounding
from nybble.scales.one import One
from nybble.solvers import Solved, Solver, Stats, Weight


@dataclass(frozen=True, kw_only=True)
class Hqq(Solver):
    """Options of the method.

    Attributes:
        lp_norm: p, 0 < p <= 1.
        beta: how closely E follows the error; shrinking takes more away where it is small.
        kappa: what beta is multiplied by after each step.
        iterations: steps at most.
        early_stop: stop when the error falls no more.
    """

    lp_norm: float = 0.7
    beta: float = 10.0
    kappa: float = 1.0
    iterations: int = 20
    early_stop: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.lp_norm <= 1:
            raise SchemeError(f"hqq: lp_norm={self.lp_norm:g}; 0 < lp_norm <= 1.")
        if not self.beta > 0 or not self.kappa >= 1:
            raise SchemeError(f"hqq: beta={self.beta:g}, kappa={self.kappa:g}; beta is positive, kappa at least 1.")
        if self.iterations < 1:
            raise SchemeError(f"hqq: iterations={self.iterations}; at least one.")

    def quantizer_for(self, quantizer: Quantizer) -> Quantizer:
        """With a real offset in place of an integer zero point."""
        if quantizer.granularity.factored or isinstance(quantizer.scale, One):
            raise SchemeError(
                f"hqq moves the offset or the scale of a block, and {quantizer} keeps neither; "
                "use group=64, channel or another granularity with one scale a block, or recipe rtn."
            )
        if not quantizer.scale.needs_integer:
            return quantizer
        rest = str(quantizer.replace(scale="minmax(offset=true)")).partition(" ")[2]
        return Quantizer(f"{quantizer.format.name} {rest}")  # all codes: int4 alone would leave -8 out

    def working_bytes(self, rows: Sequence[int], columns: int) -> int:
        """The weights, and ten copies of the largest: values, errors and their powers."""
        return 4 * columns * (sum(rows) + 10 * max(rows))

    def flops(self, rows: int, columns: int, tokens: int, inputs: Quantizer | None) -> float:
        """About 40 for a value and step."""
        return 40.0 * self.iterations * rows * columns

    def solve(self, weights: Sequence[Weight], stats: Stats) -> list[Solved]:  # noqa: D102
        return [self._solve(weight) for weight in weights]

    def _solve(self, weight: Weight) -> Solved:
        matrix, plain = weight.matrix, weight.quantizer.quantize(weight.matrix)
        plain_error = relative_error(matrix, plain.dequantize(), None)
        quantizer = self.quantizer_for(weight.quantizer)
        found = quantizer.quantize(matrix, self.params(matrix, quantizer))
        error = relative_error(matrix, found.dequantize(), None)
        if not error <= plain_error:
            note = f"worse than round-to-nearest ({error:.3g} > {plain_error:.3g}): kept the latter"
            return Solved(weight=plain, error=plain_error, rtn_error=plain_error, notes=(note,))
        chosen = None if quantizer == weight.quantizer else quantizer
        return Solved(weight=found, error=error, rtn_error=plain_error, quantizer=chosen)

    def params(self, matrix: Tensor, quantizer: Quantizer) -> QuantParams:
        """Scales and offsets for a weight.

        Args:
            matrix: float32 [rows, columns].
            quantizer: from :meth:`quantizer_for`.

        Returns:
            as they are stored.
        """
        view, shape = quantizer.granularity, tuple(matrix.shape)
        start = quantizer.soften(quantizer.measured(matrix, None))
        assert isinstance(start.scale, Tensor)
        mask = view.mask(shape, matrix.device)
        real = torch.ones((), device=matrix.device) if mask is None else mask.float()
        scale = start.scale.reshape(-1, 1)
        offset = scale.new_zeros(1, 1) if start.offset is None else block_view(start.offset, view, shape)
        found = self._steps(view.to_blocks(matrix), scale, offset, real, quantizer)
        if quantizer.scale.has_offset:
            return quantizer.harden(replace(start, offset=found.reshape(start.scale.shape)))
        moved = replace(start, scale=quantizer.scale.allowed(found).reshape(start.scale.shape))
        errors = []
        for params in (start, moved):
            lost = matrix - quantizer.fake_quantize(matrix, quantizer.harden(params))
            errors.append(view.to_blocks(lost).square().sum(1).reshape(start.scale.shape))
        assert isinstance(moved.scale, Tensor)
        return quantizer.harden(replace(start, scale=torch.where(errors[1] < errors[0], moved.scale, start.scale)))

    def _steps(self, blocks: Tensor, scale: Tensor, offset: Tensor, real: Tensor, quantizer: Quantizer) -> Tensor:
        """The offsets where the quantizer has them, else the scales; float32 [blocks, 1].

        Args:
            blocks: float32 [blocks, elements].
            scale: to begin with, [blocks, 1].
            offset: the same, or [1, 1] for all.
            real: 1 where an element is no padding, broadcasting.
            quantizer: what to round to.
        """
        tie = "nearest-even" if get_rounding(quantizer.rounding).stochastic else quantizer.rounding
        grid, moves_offset = Grid(quantizer.format, tie, quantizer.floor), quantizer.scale.has_offset
        count = real.expand_as(blocks).sum(1, keepdim=True)
        beta, least = self.beta, torch.inf
        for _ in range(self.iterations):
            values = grid.nearest(divide(blocks - offset, scale, quantizer.reciprocal))
            error = (blocks - (values * scale + offset)) * real
            rest = blocks - shrunk(error, beta, self.lp_norm)
            if moves_offset:
                offset = ((rest - values * scale) * real).sum(1, keepdim=True) / count
            else:
                power = (values.square() * real).sum(1, keepdim=True)
                best = (values * (rest - offset) * real).sum(1, keepdim=True) / power
                scale = torch.where(torch.isfinite(best) & (best > 0), best, scale)
            mean = float(error.abs().mean())
            if self.early_stop and not mean < least:
                break
            beta, least = beta * self.kappa, mean
        return offset if moves_offset else scale


def shrunk(error: Tensor, beta: float, lp_norm: float) -> Tensor:
    """The solution of ``min_e |e|_p^p + beta / 2 (e - error)^2``, as generalised soft thresholding takes it."""
    size = error.abs()
    return torch.sign(error) * (size - size.pow(lp_norm - 1) / beta).clamp_min(0)


PART = Hqq
