"""LLM-FP4: formats and largest values of weights and inputs, searched together on the layer's output error.

Liu et al. 2023, arXiv:2310.16836. Layers are independent and see the float network's inputs. Rounds of

    a. for every weight format, each row takes the clip value with the least output error, the inputs being fixed;
    b. the layer takes the weight format with the least error;
    c. for every input format, the input takes the clip value with the least error of all layers that read it;
    d. and the format with the least.

With ``inputs: ... shifted static`` the input's columns carry integer exponents s_j (the pre-shifted exponent bias),
which follow from the tensor's searched top value and the largest magnitude of each column; with ``tensor static`` that
is the paper's baseline. Dynamic inputs are rounded as the scheme says and not searched.

Where we differ: candidates are fractions of the min-max range, evenly spaced in their logarithm (the exponent bias),
not multiples of the bias, whose grid collapses where it is near zero; min-max itself is always one. Layers that read
one tensor (q, k, v) share its quantizer, so it is rounded once: the sum of their relative errors decides. The first
round starts from inputs that were searched against the float weights. A candidate's error is a quadratic form
(:mod:`nybble.solvers._layer_error`), never a run of the layer. The result falls back to min-max where that is better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from nybble.calibration.error import by_group, relative_error
from nybble.core.errors import DataError, SchemeError, UsageError
from nybble.qtensor import QuantParams
from nybble.quantizer import Quantizer
from nybble.rounding import get_rounding
from nybble.solvers import Operand, Solved, Solver, Stats, Weight
from nybble.solvers._ladder import Error, Ladder, check_searchable, descend, fractions, menu, with_format
from nybble.solvers._layer_error import InputsFixed, WeightsFixed, output_error


@dataclass(frozen=True, kw_only=True)
class LlmFp4(Solver):
    """Options of the method.

    Attributes:
        rounds: of alternating searches.
        grid: clip candidates. low, high: the range they span, as fractions of the largest magnitude.
        fine: with a coarse grid, further candidates around its best, in the format that it found; later rounds then
            try these alone. 0: every round searches the whole grid in every format.
        formats: search the split into exponent and mantissa bits too; else the scheme's formats stay.
        loss: ``output``, the squared output error; ``fisher``, each output's error weighted by the squared gradient of
            the model's loss (of linear layers; experts, tied tables and products of activations keep the former).
        tokens: calibration inputs that are used at most, evenly spread.
        tried: of these, on how many the clip values of inputs are tried and errors measured, evenly spread; 0: on all.
            Moments, by which weights are chosen, are of all: few tokens tell little about many columns.
    """

    path: ClassVar[str] = "float"

    rounds: int = 3
    grid: int = 100
    low: float = 0.01
    high: float = 1.2
    fine: int = 0
    formats: bool = True
    loss: str = "output"
    tokens: int = 32768
    tried: int = 0

    def __post_init__(self) -> None:
        if min(self.rounds, self.grid, self.tokens) < 1 or min(self.fine, self.tried) < 0:
            raise SchemeError(
                f"llm-fp4: rounds={self.rounds}, grid={self.grid}, tokens={self.tokens} must be 1 or more, "
                f"fine={self.fine}, tried={self.tried} 0 or more."
            )
        if not 0 < self.low < self.high:
            raise SchemeError(
                f"llm-fp4: the search range low={self.low:g} .. high={self.high:g} is reversed or empty; "
                "0 < low < high, as fractions of the largest magnitude."
            )
        if self.loss not in ("output", "fisher"):
            raise UsageError(f"llm-fp4: loss={self.loss!r} is neither output nor fisher.")

    def needs(self, inputs: Quantizer | None) -> frozenset[str]:  # noqa: D102
        if (
            self.loss == "fisher"
        ):  # experts and tied tables have no gradients here: their second moment is what there is
            return frozenset({"inputs", "fisher", *(["second_moment"] if inputs is None else [])})
        return frozenset({"second_moment"} if inputs is None else {"inputs"})

    def trial(self) -> LlmFp4:  # noqa: D102
        return replace(self, rounds=1, grid=1, fine=min(self.fine, 1))

    @property
    def chooses_inputs(self) -> bool:  # noqa: D102
        return True

    @property
    def most_tokens(self) -> int:  # noqa: D102
        return self.tokens

    def working_bytes(self, rows: Sequence[int], columns: int) -> int:
        """Five matrices like the second moment, of all weights four copies, of the largest eight more."""
        return 4 * columns * (5 * columns + 4 * sum(rows) + 8 * max(rows))

    def flops(self, rows: int, columns: int, tokens: int, inputs: Quantizer | None) -> float:
        """Candidates times their products; a value to be rounded counts as 2,500 (measured beside bf16 on a CPU)."""
        formats = 3 if self.formats else 1
        first = formats * self.grid + self.fine
        later = (self.rounds - 1) * (self.fine if self.fine else first)
        found = (first + later) * rows * columns * (2.0 * columns + 2500)
        if inputs is not None and inputs.static:
            searches = 2 * first + later if self.fine == 0 else first + later + self.fine
            found += searches * min(tokens, self.tried or self.tokens) * columns * (2.0 * min(rows, columns) + 2500)
        return found

    def quantizer_for(self, quantizer: Quantizer) -> Quantizer:  # noqa: D102
        if get_rounding(quantizer.rounding).stochastic:
            raise SchemeError("llm-fp4 compares candidates, which a stochastic rounding changes every time.")
        check_searchable(quantizer)
        if self.formats:
            menu(quantizer.format)
        return quantizer

    def solve(self, weights: Sequence[Weight], stats: Stats) -> list[Solved]:  # noqa: D102
        if stats.inputs is None and stats.second_moment is None:
            note = "no calibration input reached it: its own error was searched"
            found = _Search(self, weights, replace(stats, quantizer=None)).run()
            return [replace(solved, notes=(*solved.notes, note)) for solved in found]
        if stats.inputs is not None and not bool(torch.isfinite(stats.inputs).all()):
            raise DataError(
                f"the calibration inputs of {weights[0].name} hold NaN or Inf; check the data and the model's dtype."
            )
        return _Search(self, weights, stats).run()

    def solve_product(self, left: Tensor, right: Tensor, quantizer: Quantizer) -> tuple[Operand, Operand]:
        """As :meth:`solve`, each operand in turn being the input and the other the weight."""
        sides = [left, right]
        ladders = [self.ladders(x.flatten(0, 1), quantizer) for x in sides]
        chosen = [_unclipped(options[0]) for options in ladders]
        for number in range(self.rounds):
            for here, other in ((0, 1), (1, 0)):
                given = chosen[other].values.view(sides[other].shape)
                error = WeightsFixed(sides[here], sides[other], given)
                chosen[here] = self.choose(ladders[here], chosen[here], error, whole=number == 0)
        first, second = ((c.ladder.quantizer, c.ladder.params(c.fraction)) for c in chosen)
        return first, second

    def ladders(self, x: Tensor, quantizer: Quantizer) -> list[Ladder]:
        """Candidates for ``x`` [rows, columns] in every format that competes, the quantizer's own first."""
        formats = menu(quantizer.format) if self.formats else [quantizer.format]
        return [Ladder(x, with_format(quantizer, fmt)) for fmt in formats]

    def choose(self, ladders: Sequence[Ladder], before: _Choice, error: Error, whole: bool) -> _Choice:
        """The best format, and a fraction a unit, under ``error`` ([units], summed); never worse than before.

        ``whole``: the whole grid in every format, as always with ``fine=0``; else around ``before`` alone.
        """
        grid = fractions(self.low, self.high, self.grid, before.fraction.device)
        step = (self.high / self.low) ** (1 / max(1, self.grid - 1))
        if self.fine and not whole:
            ladders, grid = [before.ladder], grid[:0]
        best, least = before, error(before.values)
        for ladder in ladders:
            same = ladder is before.ladder
            start = before.fraction if same else torch.ones_like(before.fraction)
            first = (start, least if same else error(ladder.values(start)))
            fraction, errors = descend(ladder, error, first, grid)
            if errors.sum() < least.sum() or ladder is best.ladder:
                best, least = _Choice(ladder, fraction, ladder.values(fraction)), errors
        if self.fine:
            fraction, _ = descend(best.ladder, error, (best.fraction, least), grid[:0], self.fine, step)
            best = _Choice(best.ladder, fraction, best.ladder.values(fraction))
        return best


@dataclass
class _Choice:
    """What is chosen for one tensor: a ladder (so a format), a fraction a unit, and the rounded values."""

    ladder: Ladder
    fraction: Tensor
    values: Tensor


class _Search:
    """The state of one search: a choice for each weight and for the input that they share.

    Where inputs stay in float, their second moment is enough; else ``x`` holds them.
    """

    def __init__(self, method: LlmFp4, weights: Sequence[Weight], stats: Stats) -> None:
        self.method, self.weights, self.second = method, weights, stats.second_moment
        self.x = None if stats.inputs is None else stats.inputs.float()
        self.quantizer = stats.quantizer
        self.importance: Mapping[str, Tensor] = stats.fisher if method.loss == "fisher" else {}
        tokens = 1 if self.x is None else self.x.shape[-2]
        self.stride = max(1, tokens // (method.tried or tokens))
        self.power = [self._lost(w, None, torch.zeros_like(w.matrix)) or 1.0 for w in weights]
        self.ladders = [method.ladders(w.matrix, w.quantizer) for w in weights]
        self.plain = [_unclipped(options[0]) for options in self.ladders]
        self.input_ladders: list[Ladder] = []
        if self.x is not None and self.quantizer is not None and self.quantizer.static:
            self.input_ladders = method.ladders(self.x.flatten(0, -2), self.quantizer)
        self.trials = [ladder.on(self._few(ladder.x)) for ladder in self.input_ladders]
        self.plain_inputs = self._first_inputs()

    def _few(self, inputs: Tensor) -> Tensor:
        """Of inputs [rows, columns], the rows on which candidates are tried."""
        assert self.x is not None
        return inputs.view(self.x.shape)[..., :: self.stride, :].flatten(0, -2)

    def _like_x(self, inputs: Tensor | None) -> Tensor | None:
        return None if inputs is None or self.x is None else inputs.view(self.x.shape)

    def _first_inputs(self) -> Tensor | None:
        """Inputs under min-max (or measured, or in float)."""
        if self.quantizer is None or self.x is None:
            return None
        if self.input_ladders:
            return _unclipped(self.input_ladders[0]).values
        return self.quantizer.fake_quantize(self.x)

    def run(self) -> list[Solved]:
        """Search, compare with min-max, and pack."""
        inputs: _Choice | None = None
        chosen = self.plain
        if self.input_ladders:
            inputs = self._search_inputs([w.matrix for w in self.weights], _unclipped(self.input_ladders[0]), True)
        for number in range(self.method.rounds):
            rounded = inputs.values if inputs is not None else self.plain_inputs
            chosen = self._search_weights(chosen, rounded, whole=number == 0)
            if inputs is None:
                break  # nothing alternates
            inputs = self._search_inputs([c.values for c in chosen], inputs, whole=False)
        return self._settle(chosen, inputs)

    def _search_weights(self, before: Sequence[_Choice], rounded: Tensor | None, whole: bool) -> list[_Choice]:
        """Steps a and b for every weight, starting from what it has."""
        shared = None if self.importance else self._fixed(rounded)
        found = []
        for weight, choice, ladders in zip(self.weights, before, self.ladders, strict=True):
            fixed = shared or self._fixed(rounded, self.importance[weight.name].mean(1, keepdim=True))
            by_row = fixed.of(weight.matrix)
            error = by_row if choice.ladder.units == len(weight.matrix) else _whole(by_row)
            found.append(self.method.choose(ladders, choice, error, whole))
        return found

    def _fixed(self, rounded: Tensor | None, importance: Tensor | None = None) -> InputsFixed:
        if self.x is not None:
            return InputsFixed.of_inputs(self.x, self._like_x(rounded), importance)
        return InputsFixed(self.second)

    def _search_inputs(self, values: Sequence[Tensor], before: _Choice, whole: bool) -> _Choice:
        """Steps c and d for the shared input, starting from what it has."""
        assert self.x is not None
        scale = [p**-0.5 for p in self.power]
        matrix = torch.cat([by_group(w.matrix * s, self.x) for w, s in zip(self.weights, scale, strict=True)], -2)
        rounded = torch.cat([by_group(v * s, self.x) for v, s in zip(values, scale, strict=True)], -2)
        few = slice(None, None, self.stride)
        importance = torch.cat([self.importance[w.name][few] for w in self.weights], 1) if self.importance else None
        error = WeightsFixed(self.x[..., few, :], matrix, rounded, importance)
        trial = self.trials[self.input_ladders.index(before.ladder)]
        started = _Choice(trial, before.fraction, self._few(before.values))
        found = self.method.choose(self.trials, started, error, whole)
        ladder = self.input_ladders[self.trials.index(found.ladder)]
        return _Choice(ladder, found.fraction, ladder.values(found.fraction))

    def _settle(self, chosen: Sequence[_Choice], inputs: _Choice | None) -> list[Solved]:
        """Pack the choices, or min-max where that has less error in all."""
        given = inputs.values if inputs is not None else self.plain_inputs
        errors = [self._error(i, given, c.values) for i, c in enumerate(chosen)]
        base = [self._error(i, self.plain_inputs, c.values) for i, c in enumerate(self.plain)]
        notes: tuple[str, ...] = ()
        if sum(errors) > sum(base):
            notes = (f"min-max was better ({sum(base):.3g} < {sum(errors):.3g}): kept it",)
            chosen, errors = self.plain, base
            inputs = _unclipped(self.input_ladders[0]) if self.input_ladders else None
        found_inputs = None
        if inputs is not None:
            found_inputs = (inputs.ladder.quantizer, inputs.ladder.params(inputs.fraction))
        return [
            self._solved(weight, choice, error, plain, found_inputs, notes)
            for weight, choice, error, plain in zip(self.weights, chosen, errors, base, strict=True)
        ]

    def _error(self, index: int, inputs: Tensor | None, values: Tensor) -> float:
        """Output error over the power of the output."""
        if self.x is None:
            return relative_error(self.weights[index].matrix, values, self.second)
        return self._lost(self.weights[index], inputs, values) / self.power[index]

    def _lost(self, weight: Weight, inputs: Tensor | None, values: Tensor) -> float:
        if self.x is None:
            return 1.0
        few = slice(None, None, self.stride)
        given = None if inputs is None else inputs.view(self.x.shape)[..., few, :]
        importance = self.importance.get(weight.name)
        importance = None if importance is None else importance[few]
        return output_error(self.x[..., few, :], given, weight.matrix, values, importance)

    def _solved(
        self,
        weight: Weight,
        choice: _Choice,
        error: float,
        plain: float,
        inputs: tuple[Quantizer, QuantParams] | None,
        notes: tuple[str, ...],
    ) -> Solved:
        ladder = choice.ladder
        packed = ladder.quantizer.quantize(weight.matrix, ladder.params(choice.fraction))
        return Solved(
            weight=packed, error=error, rtn_error=plain, notes=notes, quantizer=ladder.quantizer, inputs=inputs,
            clip=choice.fraction.cpu(),
        )  # fmt: skip


def _whole(by_row: Error) -> Error:
    """The sum over rows, for a fraction that all rows share."""
    return lambda values: by_row(values).sum().reshape(1)


def _unclipped(ladder: Ladder) -> _Choice:
    """Min-max."""
    fraction = torch.ones(ladder.units, dtype=torch.float32, device=ladder.x.device)
    return _Choice(ladder, fraction, ladder.values(fraction))


PART = LlmFp4
