"""What was done to each layer: rows that the report, the manifest and ``--json`` share."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from nybble.qtensor import Factored, QuantParams, dense
from nybble.quantizer import Quantizer
from nybble.report.portrait import input_picture, weight_picture
from nybble.scheme import Rule
from nybble.solvers import Solved, Weight, relative_error


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """One weight.

    Attributes:
        name: full name. weights, inputs, outputs: quantizer lines, None where float. shape: [out, in].
        bits: stored bits a weight, scales included. sqnr: of the weight, dB.
        error: relative output error that the solver minimised (of the weight itself without calibration).
        rtn_error: the same for round-to-nearest.
        input_scale: a static input's scale. input_shifts: how many columns have each shift, 0 first (LLM-FP4).
        clip: smallest, middle and largest of the rows' clip values, over the row's largest magnitude; if searched.
        notes: fallbacks. weight_picture, input_picture: see :mod:`nybble.report.portrait`; the latter where
            calibration ran the layer.
    """

    name: str
    shape: tuple[int, ...]
    weights: str | None
    inputs: str | None
    outputs: str | None
    bits: float
    sqnr: float | None
    error: float | None
    rtn_error: float | None
    input_scale: float | None = None
    input_shifts: tuple[int, ...] | None = None
    clip: tuple[float, float, float] | None = None
    notes: tuple[str, ...] = ()
    weight_picture: dict[str, Any] | None = None
    input_picture: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> LayerRow:
        """Inverse of :meth:`to_dict`."""
        found: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return LayerRow(**found)


def layer_row(
    name: str,
    rule: Rule,
    shape: tuple[int, int],
    weight: Weight | None,
    solved: Solved | None,
    inputs: tuple[Quantizer | None, QuantParams | None],
    sample: Tensor | None = None,
) -> LayerRow:
    """The row of one weight [out, in].

    Args:
        name: full name.
        rule: the scheme's.
        shape: of the weight.
        weight: None where it stays in float.
        solved: the same.
        inputs: the quantizer that the input really gets, and its parameters if they are static.
        sample: some of the inputs, [tokens, columns].
    """
    sqnr = None
    if solved is not None and weight is not None:
        lost = relative_error(weight.matrix, solved.weight.dequantize(), None)
        sqnr = -10 * math.log10(lost) if lost > 0 else None
    quantizer, params = inputs
    scale, shifts = None if params is None else params.scale, None
    if isinstance(scale, Factored):
        scale, powers = (dense(factor) for factor in scale.factors)
        shifts = tuple(torch.bincount(powers.reshape(-1).log2().neg().long()).tolist())
    clip = None
    if solved is not None and solved.clip is not None:
        low, middle, high = torch.quantile(solved.clip.float(), torch.tensor([0.0, 0.5, 1.0])).tolist()
        clip = (low, middle, high)
    given: object = rule.weights if solved is None else solved.stored or solved.quantizer or rule.weights
    return LayerRow(
        name=name,
        shape=shape,
        weights=None if given is None else str(given),
        inputs=None if quantizer is None else str(quantizer),
        outputs=None if rule.outputs is None else str(rule.outputs),
        bits=16.0 if solved is None else solved.weight.bits_per_element(),
        sqnr=sqnr,
        error=None if solved is None else solved.error,
        rtn_error=None if solved is None else solved.rtn_error,
        input_scale=float(scale.max()) if isinstance(scale, Tensor) else None,
        input_shifts=shifts,
        clip=clip,
        weight_picture=None if solved is None or weight is None else weight_picture(weight.matrix, solved.weight),
        input_picture=None if sample is None else input_picture(sample, quantizer, params),
        notes=() if solved is None else solved.notes,
    )


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a run did: rows for layers, and the manifest that says with what.

    Attributes:
        layers: one a weight. manifest: model, recipe, data hashes, versions. seconds: wall time of the quantization.
        evaluation: metrics by name after quantization (and of the float model under ``float``).
    """

    layers: tuple[LayerRow, ...]
    manifest: dict[str, Any]
    seconds: float
    evaluation: dict[str, Any] | None = None

    def worst(self, count: int = 5) -> list[LayerRow]:
        """The layers with the largest relative error."""
        return sorted(self.layers, key=lambda row: -(row.error or 0.0))[:count]

    @property
    def bits(self) -> float:
        """Stored bits a quantized weight, scales included."""
        total = sum(math.prod(row.shape) for row in self.layers)
        return sum(row.bits * math.prod(row.shape) for row in self.layers) / total if total else 16.0
