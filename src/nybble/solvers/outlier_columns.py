"""Outlier columns: the inputs that carry most of the energy keep 16-bit weights, the others get the scheme's quantizer.

Proxy quantization of Dettmers & Zettlemoyer 2022 (arXiv:2212.09720, section 3; p = 2% there): a few hidden units have
activations many times larger than all others, and what the next layer's weights for them lose, its output loses. With
k bits for the rest it costs p (16 - k) bits a weight. They find it to make 3 bits stable and to be of no use at 4.

Where calibration saw the input, its energy ``E x_c^2`` says which columns those are. (The paper has no calibration and
takes the standard deviation of the producing layer's weights for each unit as a proxy of it; a solver sees what reads
an input and not what makes it, so without calibration the columns with most weight energy stand in.) All weights that
read one input keep the same columns.

The rest is quantized as a matrix of its own, its columns in their order. So many columns are kept, at least, that the
quantizer's blocks divide what is left: with group=32 that is a multiple of 32; flat=64, which runs over rows, takes any
number. Where that would be more than half of all, or where the split has the larger output error, the matrix is rounded
to nearest as a whole, and the report says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.calibration.error import input_energy, relative_error
from nybble.core.errors import GranularityError, SchemeError
from nybble.qtensor.block import BlockQTensor
from nybble.qtensor.split import SplitQTensor
from nybble.quantizer import Quantizer
from nybble.solvers import Solved, Solver, Stats, Weight

PLAIN = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, kw_only=True)
class OutlierColumns(Solver):
    """Options of the method.

    Attributes:
        share: of the columns that are kept, at least one.
        keep: what they are kept in: ``float16``, ``bfloat16``, ``float32``, or a quantizer line (``int8 channel``).
        by: ``inputs``, the columns with most input energy; ``weights``, those with most weight energy.
    """

    share: float = 0.02
    keep: str = "float16"
    by: str = "inputs"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 0.5:
            raise SchemeError(f"outlier-columns: share={self.share:g} of the columns; 0 < share <= 0.5.")
        if self.by not in ("inputs", "weights"):
            raise SchemeError(f"outlier-columns: by={self.by}; it is inputs or weights.")
        if self.keep not in PLAIN:
            Quantizer(self.keep)

    def stored_bytes(self, quantizer: Quantizer, shape: tuple[int, int]) -> float:
        """Of both parts, and an index a column."""
        count = self._count(quantizer, shape)
        if count is None:
            return quantizer.stored_bytes(shape)
        kept = (shape[0], count)
        most = kept[0] * count * getattr(torch, self.keep).itemsize if self.keep in PLAIN else None
        return (
            quantizer.stored_bytes((shape[0], shape[1] - count))
            + (Quantizer(self.keep).stored_bytes(kept) if most is None else most)
            + 4 * shape[1]
        )

    def needs(self, inputs: Quantizer | None) -> frozenset[str]:  # noqa: D102
        return frozenset({"second_moment"})

    def solve(self, weights: Sequence[Weight], stats: Stats) -> list[Solved]:  # noqa: D102
        energy = input_energy(stats.second_moment, 1) if self.by == "inputs" else None
        if energy is None:
            energy = torch.stack([weight.matrix.square().sum(0) for weight in weights]).sum(0)
        order = energy.reshape(-1).argsort(descending=True, stable=True)
        return [self._solve(weight, order, stats.second_moment) for weight in weights]

    def _solve(self, weight: Weight, order: Tensor, second: Tensor | None) -> Solved:
        matrix, quantizer = weight.matrix, weight.quantizer
        plain = quantizer.quantize(matrix)
        plain_error = relative_error(matrix, plain.dequantize(), second)
        count = self._count(quantizer, (matrix.shape[0], matrix.shape[1]))
        if count is None:
            note = f"no share of columns up to half leaves what {quantizer.granularity} divides: rounded to nearest"
            return Solved(weight=plain, error=plain_error, rtn_error=plain_error, notes=(note,))
        kept, rest = order[:count].sort().values, order[count:].sort().values
        parts = (quantizer.quantize(matrix[:, rest]), self._kept(matrix[:, kept]))
        index = torch.cat([rest, kept]).int()
        found = SplitQTensor((matrix.shape[0], matrix.shape[1]), 1, index, parts)
        error = relative_error(matrix, found.dequantize(), second)
        if not error <= plain_error:
            note = f"worse than round-to-nearest ({error:.3g} > {plain_error:.3g}): kept the latter"
            return Solved(weight=plain, error=plain_error, rtn_error=plain_error, notes=(note,))
        line = f"{quantizer}; {count} of {matrix.shape[1]} columns {self.keep}"
        return Solved(weight=found, error=error, rtn_error=plain_error, stored=line)

    def _kept(self, columns: Tensor) -> Tensor | BlockQTensor:
        if self.keep in PLAIN:
            return columns.to(getattr(torch, self.keep))
        return Quantizer(self.keep).quantize(columns)

    def _count(self, quantizer: Quantizer, shape: tuple[int, int]) -> int | None:
        """The smallest number of columns not below the share that fits both quantizers; None if half don't suffice."""
        rows, columns = shape
        for count in range(max(1, math.ceil(self.share * columns)), columns // 2 + 1):
            try:
                quantizer.granularity.check((rows, columns - count))
                if self.keep not in PLAIN:
                    Quantizer(self.keep).granularity.check((rows, count))
            except GranularityError:
                continue
            return count
        return None


PART = OutlierColumns
