"""Outlier columns: the inputs that carry most of the energy keep more bits, the others get the scheme's quantizer.

Proxy quantization of Dettmers & Zettlemoyer 2022 (arXiv:2212.09720, section 3; p = 2% there): a few hidden units have
activations many times larger than all others, and what the next layer's weights for them lose, its output loses. With
k bits for the rest it costs p (16 - k) bits a weight. They find it to make 3 bits stable and to be of no use at 4.

Where calibration saw the input, its energy ``E x_c^2`` says which columns those are. (The paper has no calibration and
takes the standard deviation of the producing layer's weights for each unit as a proxy of it; a solver sees what reads
an input and not what makes it, so without calibration the columns with most weight energy stand in.) All weights that
read one input keep the same columns.

PTQ1.61's structured mask (Zhao et al. 2025, arXiv:2502.13179) is the same with other sizes: from
``|(W - W_hat) x|_1 <= sum_i |x_i| sum_j |dW_ji|`` it takes the fifth of the columns with the largest inputs
(``by: largest``, max|x_c| over all tokens, as in its code; ``by: mean``, mean|x_c|, as in its pseudo-code), which get
4 bits a weight while all others are binary. Equal sizes are told apart by their place, so the number of columns is
always the one asked for (the published code takes all that reach its threshold, one more at least). ``span: whole`` is
its code's: the range of the kept columns is that of the whole row.

A file holds one bit a column that says which part it is in.

The rest is quantized as a matrix of its own, its columns in their order. So many columns are kept, at least, that the
quantizer's blocks divide what is left: with group=32 that is a multiple of 32; flat=64, which runs over rows, takes any
number. Where that would be more than half of all, or where the split has the larger output error, the matrix is rounded
to nearest as a whole, and the report says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nybble.calibration.error import input_energy, relative_error
from nybble.core.errors import GranularityError, SchemeError
from nybble.qtensor.block import BlockQTensor
from nybble.qtensor.split import SplitQTensor, pack_members
from nybble.quantizer import Quantizer
from nybble.solvers import Solved, Solver, Stats, Weight

PLAIN = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, kw_only=True)
class OutlierColumns(Solver):
    """Options of the method.

    Attributes:
        share: of the columns that are kept.
        keep: what they are kept in: ``float16``, ``bfloat16``, ``float32``, or a quantizer line (``int8 channel``).
        by: ``inputs``, the columns with most input energy; ``largest`` and ``mean``, those with the largest greatest,
            or mean, input; ``weights``, those with most weight energy.
        count: a share that is no whole number of columns is rounded ``up``, or ``down``.
        span: a quantizer of ``keep`` finds its scales on the ``kept`` columns, or on the ``whole`` matrix.
    """

    share: float = 0.02
    keep: str = "float16"
    by: Literal["inputs", "largest", "mean", "weights"] = "inputs"
    count: Literal["up", "down"] = "up"
    span: Literal["kept", "whole"] = "kept"

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 0.5:
            raise SchemeError(f"outlier-columns: share={self.share:g} of the columns; 0 <= share <= 0.5.")
        if self.keep not in PLAIN:
            cut = Quantizer(self.keep).granularity
            if self.span == "whole" and (cut.factored or cut.scale_shape((64, 4096)) != cut.scale_shape((64, 2048))):
                raise SchemeError(
                    f"outlier-columns: span=whole takes scales of the whole matrix for some of its columns, and {cut} "
                    "has others for fewer columns; keep them by channel or tensor, or leave span out."
                )
        elif self.span == "whole":
            raise SchemeError(f"outlier-columns: span=whole is about scales, and {self.keep} has none; leave it out.")

    def stored_bytes(self, quantizer: Quantizer, shape: tuple[int, int]) -> float:
        """Of both parts, and a bit a column."""
        count = self._count(quantizer, shape)
        if not count:
            return quantizer.stored_bytes(shape)
        kept = (shape[0], count)
        most = kept[0] * count * getattr(torch, self.keep).itemsize if self.keep in PLAIN else None
        return (
            quantizer.stored_bytes((shape[0], shape[1] - count))
            + (Quantizer(self.keep).stored_bytes(kept) if most is None else most)
            + math.ceil(shape[1] / 8)
        )

    def needs(self, inputs: Quantizer | None) -> frozenset[str]:  # noqa: D102
        return frozenset({"second_moment", "sizes"} if self.by in ("largest", "mean") else {"second_moment"})

    def solve(self, weights: Sequence[Weight], stats: Stats) -> list[Solved]:  # noqa: D102
        found = self._sizes(stats)
        if found is None:
            found = torch.stack([weight.matrix.square().sum(0) for weight in weights]).sum(0)
        order = found.reshape(-1).argsort(descending=True, stable=True)
        return [self._solve(weight, order, stats.second_moment) for weight in weights]

    def _sizes(self, stats: Stats) -> Tensor | None:
        """What columns are chosen by, where calibration saw their inputs."""
        if self.by == "inputs":
            return input_energy(stats.second_moment, 1)
        if self.by == "weights" or stats.sizes is None:
            return None
        return stats.sizes.largest if self.by == "largest" else stats.sizes.mean

    def _solve(self, weight: Weight, order: Tensor, second: Tensor | None) -> Solved:
        matrix, quantizer = weight.matrix, weight.quantizer
        plain = quantizer.quantize(matrix)
        plain_error = relative_error(matrix, plain.dequantize(), second)
        count = self._count(quantizer, (matrix.shape[0], matrix.shape[1]))
        if count is None:
            note = f"no share of columns up to half leaves what {quantizer.granularity} divides: rounded to nearest"
            return Solved(weight=plain, error=plain_error, rtn_error=plain_error, notes=(note,))
        if not count:
            return Solved(weight=plain, error=plain_error, rtn_error=plain_error)
        kept, rest = order[:count].sort().values, order[count:].sort().values
        parts = (quantizer.quantize(matrix[:, rest]), self._kept(matrix, kept))
        index = pack_members(torch.zeros_like(order).index_fill_(0, kept, 1), 2)
        found = SplitQTensor((matrix.shape[0], matrix.shape[1]), 1, index, parts)
        error = relative_error(matrix, found.dequantize(), second)
        if not error <= plain_error:
            note = f"worse than round-to-nearest ({error:.3g} > {plain_error:.3g}): kept the latter"
            return Solved(weight=plain, error=plain_error, rtn_error=plain_error, notes=(note,))
        line = f"{quantizer}; {count} of {matrix.shape[1]} columns {self.keep}"
        return Solved(weight=found, error=error, rtn_error=plain_error, stored=line)

    def _kept(self, matrix: Tensor, kept: Tensor) -> Tensor | BlockQTensor:
        if self.keep in PLAIN:
            return matrix[:, kept].to(getattr(torch, self.keep))
        quantizer = Quantizer(self.keep)
        return quantizer.quantize(matrix[:, kept], quantizer.fit(matrix) if self.span == "whole" else None)

    def _count(self, quantizer: Quantizer, shape: tuple[int, int]) -> int | None:
        """The smallest number of columns not below the share that fits both quantizers; None if half don't suffice.

        0 where the share is 0, or less than one column rounded down.
        """
        rows, columns = shape
        least = math.ceil(self.share * columns) if self.count == "up" else math.floor(self.share * columns)
        if not least:
            return 0
        for count in range(least, columns // 2 + 1):
            try:
                quantizer.granularity.check((rows, columns - count))
                if self.keep not in PLAIN:
                    Quantizer(self.keep).granularity.check((rows, count))
            except GranularityError:
                continue
            return count
        return None


PART = OutlierColumns
