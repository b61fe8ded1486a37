"""Round to nearest; with ``scale`` under another scale rule than the scheme's (absmax, mse(...))."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from nybble.calibration.error import relative_error
from nybble.core.errors import SchemeError
from nybble.quantizer import Quantizer
from nybble.scales import parse_scale_rule
from nybble.scales.minmax import MinMax
from nybble.scales.mse import Mse
from nybble.solvers import Solved, Solver, Stats, Weight


@dataclass(frozen=True, kw_only=True)
class Rtn(Solver):
    """``scale``: a scale rule that replaces the scheme's for weights; empty keeps it."""

    scale: str = ""

    def quantizer_for(self, quantizer: Quantizer) -> Quantizer:  # noqa: D102
        if not self.scale:
            return quantizer
        rule = parse_scale_rule(self.scale)
        if quantizer.scale.has_offset:
            raise SchemeError(
                f"{quantizer} keeps a real offset, which scale={self.scale} does not search; use recipe rtn."
            )
        if quantizer.scale.needs_integer:
            rule = replace(rule, asymmetric=True) if isinstance(rule, Mse) else MinMax()
        return quantizer.replace(scale=rule)

    def solve(self, weights: Sequence[Weight], stats: Stats) -> list[Solved]:  # noqa: D102
        return [self._solve(weight) for weight in weights]

    def _solve(self, weight: Weight) -> Solved:
        plain = weight.quantizer.quantize(weight.matrix)
        plain_error = relative_error(weight.matrix, plain.dequantize(), None)
        chosen = self.quantizer_for(weight.quantizer)
        if chosen == weight.quantizer:
            return Solved(weight=plain, error=plain_error, rtn_error=plain_error)
        found = chosen.quantize(weight.matrix)
        error = relative_error(weight.matrix, found.dequantize(), None)
        if error > plain_error and self.scale.startswith("mse"):
            return Solved(
                weight=plain,
                error=plain_error,
                rtn_error=plain_error,
                notes=("fell back to the scheme's own scale rule",),
            )
        return Solved(weight=found, error=error, rtn_error=plain_error)


PART = Rtn
