"""Format and exponent bias of each tensor by its own squared error: weights by theirs, static inputs by calibration's.

    over encodings (e, m) of the scheme's width and 111 values of c, 0.1 .. 1.2 max|x|:  min sum (x - Q(x; e, m, c))^2

Chen, Giannoula and Moshovos 2024, arXiv:2408.06995, step 1, with the grid of Kuzmin et al. 2022 (arXiv:2208.09225). A
real exponent bias is a scale, so c stands for it: scale = c / (largest value of the format). Encodings are E2M5, E3M4,
E4M3 and E5M2 of 8 bits, E1M2 and E2M1 of 4; ``wide`` adds E3M0. All are finite: no code is Inf or NaN.

Where we differ: inputs are searched on the network whose blocks before this one are quantized, but before this block's
own rounding is learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from nybble.calibration.error import relative_error
from nybble.core.errors import DataError, SchemeError
from nybble.formats import NumberFormat
from nybble.formats.minifloat import Minifloat, make_minifloat
from nybble.qtensor import QuantParams
from nybble.quantizer import Quantizer
from nybble.rounding import get_rounding
from nybble.solvers import Solved, Solver, Stats, Weight
from nybble.solvers._ladder import Ladder, check_searchable, descend, with_format


@dataclass(frozen=True, kw_only=True)
class FloatSearch(Solver):
    """Options of the method.

    Attributes:
        grid: how many largest values c are tried. low, high: the first and the last, as shares of max|x|.
        wide: encodings without mantissa bits, too.
        tokens: calibration inputs that are used at most, evenly spread.
    """

    path: ClassVar[str] = "quantized"

    grid: int = 111
    low: float = 0.1
    high: float = 1.2
    wide: bool = False
    tokens: int = 8192

    def __post_init__(self) -> None:
        if min(self.grid, self.tokens) < 1 or not 0 < self.low < self.high:
            raise SchemeError(
                f"float-search: grid={self.grid} and tokens={self.tokens} are 1 or more, and 0 < low < high; got "
                f"{self.low:g} .. {self.high:g}."
            )

    def needs(self, inputs: Quantizer | None) -> frozenset[str]:  # noqa: D102
        return frozenset({"inputs"} if inputs is not None and inputs.static else ())

    @property
    def chooses_inputs(self) -> bool:  # noqa: D102
        return True

    @property
    def most_tokens(self) -> int:  # noqa: D102
        return self.tokens

    def trial(self) -> FloatSearch:  # noqa: D102
        return replace(self, grid=1)

    def flops(self, rows: int, columns: int, tokens: int, inputs: Quantizer | None) -> float:
        """Candidates times values; rounding one counts as 50."""
        seen = min(tokens, self.tokens) * columns if inputs is not None and inputs.static else 0
        return 50.0 * 4 * self.grid * (rows * columns + seen)

    def quantizer_for(self, quantizer: Quantizer) -> Quantizer:  # noqa: D102
        if get_rounding(quantizer.rounding).stochastic:
            raise SchemeError("float-search compares candidates, which a stochastic rounding changes every time.")
        check_searchable(quantizer)
        return quantizer

    def solve(self, weights: Sequence[Weight], stats: Stats) -> list[Solved]:  # noqa: D102
        inputs = self._of_inputs(weights[0].name, stats)
        return [replace(self._of_weight(weight), inputs=inputs) for weight in weights]

    def _of_weight(self, weight: Weight) -> Solved:
        quantizer, params, fraction = self.search(weight.matrix, weight.quantizer)
        found, plain = quantizer.quantize(weight.matrix, params), weight.quantizer.quantize(weight.matrix)
        error, rtn = (relative_error(weight.matrix, packed.dequantize(), None) for packed in (found, plain))
        return Solved(weight=found, error=error, rtn_error=rtn, quantizer=quantizer, clip=fraction.cpu())

    def _of_inputs(self, name: str, stats: Stats) -> tuple[Quantizer, QuantParams] | None:
        if stats.quantizer is None or not stats.quantizer.static:
            return None
        if stats.inputs is None:
            raise DataError(f"no calibration input reached {name}, whose range is to be searched; give other data.")
        x = stats.inputs.float().flatten(0, -2)
        if not bool(x.isfinite().all()):
            raise DataError(f"the calibration inputs of {name} hold NaN or Inf; check the data and the model's dtype.")
        quantizer, params, _ = self.search(x, stats.quantizer)
        return quantizer, params

    def search(self, x: Tensor, quantizer: Quantizer) -> tuple[Quantizer, QuantParams, Tensor]:
        """The encoding and the range with the least squared error; the scheme's own under min-max where none is better.

        Args:
            x: float32 [rows, columns].
            quantizer: says the width and the granularity.

        Returns:
            the quantizer in its format, its parameters, and c over max|x|, float32 [units].
        """
        shares = torch.linspace(self.low, self.high, self.grid, dtype=torch.float32, device=x.device)
        best: tuple[Ladder, Tensor, Tensor] | None = None
        for fmt in encodings(quantizer.format, self.wide):
            ladder = Ladder(x, with_format(quantizer, fmt))

            def lost(values: Tensor, units: int = ladder.units) -> Tensor:
                return (values - x).square().reshape(units, -1).sum(1)

            first = torch.ones(ladder.units, dtype=torch.float32, device=x.device)
            fraction, errors = descend(ladder, lost, (first, lost(ladder.values(first))), shares)
            if best is None or errors.sum() < best[2].sum():
                best = ladder, fraction.clone(), errors.clone()
        assert best is not None
        return best[0].quantizer, best[0].params(best[1]), best[1]


def encodings(fmt: NumberFormat, wide: bool = False) -> list[NumberFormat]:
    """The encodings of a signed minifloat's width, all finite: of 8 bits 2 to 5 exponent bits, of 4 one or two.

    Of integers, tables and other widths the format alone: its range is searched, as the integer baselines have it.
    """
    if not isinstance(fmt, Minifloat) or not 4 <= fmt.bits <= 8 or not fmt.has_sign:
        return [fmt]
    width = fmt.bits - 1
    least, most = (1 if fmt.bits == 4 else 2), width - (2 if fmt.bits == 8 else 0 if wide else 1)
    return [make_minifloat(e, width - e, signed=True) for e in range(least, most + 1)]


PART = FloatSearch
