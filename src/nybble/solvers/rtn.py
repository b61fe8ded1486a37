"""Round to nearest; with ``scale`` under another scale rule than the scheme's (absmax, mse(...))."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from nybble.calibration.error import input_energy, relative_error
from nybble.core.errors import SchemeError
from nybble.quantizer import Quantizer
from nybble.scales import ScaleRule, parse_scale_rule
from nybble.scales.absmax import AbsMax
from nybble.scales.minmax import MinMax
from nybble.scales.mse import Mse
from nybble.solvers import Solved, Solver, Stats, Weight


@dataclass(frozen=True, kw_only=True)
class Rtn(Solver):
    """Options of the method.

    Attributes:
        scale: a scale rule that replaces the scheme's for weights; empty keeps it.
        weighted: each column counts with its inputs' energy where a rule searches (mse: AWQ's clipping, Lin et al.
            2023, without the products of different inputs; least-squares: llama.cpp's imatrix).
    """

    scale: str = ""
    weighted: bool = False

    def needs(self, inputs: Quantizer | None) -> frozenset[str]:  # noqa: D102
        return frozenset({"second_moment"} if self.weighted else ())

    def quantizer_for(self, quantizer: Quantizer) -> Quantizer:  # noqa: D102
        if self.scale:
            rule = parse_scale_rule(self.scale)
            if quantizer.scale.has_offset:
                rule = _with_offset(rule, quantizer)
            elif quantizer.scale.needs_integer:
                rule = _around_zero_point(rule, quantizer)
            quantizer = quantizer.replace(scale=rule)
        if self.weighted and not _searches(quantizer):
            raise SchemeError(
                f"{quantizer} searches no scale that weighted=true could move; give scale: mse or least-squares."
            )
        return quantizer

    def trial(self) -> Rtn:  # noqa: D102
        rule = parse_scale_rule(self.scale) if self.scale else None
        return replace(self, scale=str(replace(rule, grid=1))) if isinstance(rule, Mse) else self

    def solve(self, weights: Sequence[Weight], stats: Stats) -> list[Solved]:  # noqa: D102
        return [self._solve(weight, stats.second_moment if self.weighted else None) for weight in weights]

    def _solve(self, weight: Weight, second: Tensor | None) -> Solved:
        plain = weight.quantizer.quantize(weight.matrix)
        plain_error = relative_error(weight.matrix, plain.dequantize(), second)
        chosen = self.quantizer_for(weight.quantizer)
        energy = input_energy(second, len(weight.matrix))
        if chosen == weight.quantizer and energy is None:
            return Solved(weight=plain, error=plain_error, rtn_error=plain_error)
        params = None
        if energy is not None:
            params = chosen.fit(weight.matrix - weight.matrix.mean() if chosen.center else weight.matrix, energy)
        found = chosen.quantize(weight.matrix, params)
        error = relative_error(weight.matrix, found.dequantize(), second)
        if error > plain_error and _searches(chosen):
            return Solved(
                weight=plain,
                error=plain_error,
                rtn_error=plain_error,
                notes=("fell back to the scheme's own scale rule",),
            )
        return Solved(weight=found, error=error, rtn_error=plain_error)


def _around_zero_point(rule: ScaleRule, quantizer: Quantizer) -> ScaleRule:
    """The rule for ranges around an integer zero point.

    Raises:
        SchemeError: it finds a scale alone.
    """
    if hasattr(rule, "asymmetric"):
        return replace(rule, asymmetric=True)  # type: ignore[call-arg]
    if isinstance(rule, AbsMax):
        return MinMax()  # the largest magnitude on each side
    if rule.needs_integer:
        return rule
    raise SchemeError(
        f"{quantizer} keeps an integer zero point, and scale={rule} finds none; use scale: absmax, mse or cfp, or a "
        "weight line without symmetric=false."
    )


def _with_offset(rule: ScaleRule, quantizer: Quantizer) -> ScaleRule:
    """The rule for ranges with a real offset.

    Raises:
        SchemeError: it finds a scale alone.
    """
    if isinstance(rule, AbsMax):
        return MinMax(offset=True)
    if hasattr(rule, "offset"):
        return replace(rule, offset=True)  # type: ignore[call-arg]
    raise SchemeError(
        f"{quantizer} keeps a real offset, and scale={rule} finds none; use scale: absmax, mse, cfp, mean or "
        "least-squares, or recipe rtn."
    )


def _searches(quantizer: Quantizer) -> bool:
    """Whether the energy of the inputs moves its scales."""
    return isinstance(quantizer.scale, Mse) or quantizer.scale.weighs


PART = Rtn
