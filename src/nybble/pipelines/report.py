"""What was done to each layer: rows that the report, the manifest and ``--json`` share."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from nybble.qtensor import QuantParams
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
        input_scale: a static input's scale. notes: fallbacks.
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
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self) | {"shape": list(self.shape), "notes": list(self.notes)}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> LayerRow:
        """Inverse of :meth:`to_dict`."""
        return LayerRow(**(data | {"shape": tuple(data["shape"]), "notes": tuple(data["notes"])}))


def layer_row(
    name: str,
    rule: Rule,
    shape: tuple[int, int],
    weight: Weight | None,
    solved: Solved | None,
    params: QuantParams | None,
) -> LayerRow:
    """The row of one weight [out, in] (``weight`` and ``solved`` None: it stays in float)."""
    sqnr = None
    if solved is not None and weight is not None:
        lost = relative_error(weight.matrix, solved.weight.dequantize(), None)
        sqnr = -10 * math.log10(lost) if lost > 0 else None
    scale = None if params is None else params.scale
    return LayerRow(
        name=name,
        shape=shape,
        weights=None if rule.weights is None else str(rule.weights),
        inputs=None if rule.inputs is None else str(rule.inputs),
        outputs=None if rule.outputs is None else str(rule.outputs),
        bits=16.0 if solved is None else solved.weight.bits_per_element(),
        sqnr=sqnr,
        error=None if solved is None else solved.error,
        rtn_error=None if solved is None else solved.rtn_error,
        input_scale=float(scale.max()) if isinstance(scale, Tensor) else None,
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
