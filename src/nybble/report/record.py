"""What was done to each layer: rows that the report, the manifest and ``--json`` share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from nybble.calibration.block import BlockState, Record
from nybble.calibration.error import relative_error
from nybble.core import ranks
from nybble.nn.kinds import quant_modules
from nybble.nn.packed import Packed
from nybble.qtensor import Factored, QTensor, dense
from nybble.qtensor.block import BlockQTensor
from nybble.qtensor.low_rank_sum import LowRankSum
from nybble.quantizer import Quantizer
from nybble.report.portrait import input_picture, weight_picture
from nybble.rounding import get_rounding


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
        learned: what reconstructions did, or None: ``windows``, one entry each (``reconstruction.engine.reconstruct``
            says what it holds), and what ``reconstruction.moves.moves`` says of the layer that came out.
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
    learned: dict[str, Any] | None = None
    weight_picture: dict[str, Any] | None = None
    input_picture: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON; ``learned`` only where something was."""
        found = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        if self.learned is None:
            del found["learned"]
        return found

    @staticmethod
    def from_dict(data: dict[str, Any]) -> LayerRow:
        """Inverse of :meth:`to_dict`."""
        found: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return LayerRow(**found)


def told(row: LayerRow, entries: Sequence[Mapping[str, Any]]) -> LayerRow:
    """A row that says, in front of what was learned of its layer, what was learned before of the whole network."""
    notes = [
        f"{e['loss']}: {e['before']:.3g} -> {e['after']:.3g} on the whole network"
        + ("; no step was better than the start, which was kept" if e["kept"] == "start" else "")
        for e in entries
    ]
    learned = row.learned or {}
    windows = [*map(dict, entries), *learned.get("windows", ())]
    return replace(row, notes=(*notes, *row.notes), learned={**learned, "windows": windows})


def block_rows(state: BlockState) -> list[LayerRow]:
    """The rows of a finished block, from the records of its targets and the modules that are really there.

    Several processes share them. Where something would be drawn (of a stochastic rounding), each makes all, as the
    draws of one row go on from those of the one before.
    """
    records = list(state.records.items())
    draws = any(get_rounding(q.rounding).stochastic for _, r in records for q in (r.quantizer, r.inputs[0]) if q)
    if draws or ranks.size() == 1:
        return [_row(state, name, record) for name, record in records]
    owners = ranks.owners([math.prod(record.target.shape) for _, record in records])
    mine = {n: _row(state, *records[n]) for n, owner in enumerate(owners) if owner == ranks.number()}
    made = {n: row for each in ranks.gather(mine) for n, row in each.items()}
    return [made[number] for number in range(len(records))]


def described_rows(model: nn.Module) -> list[LayerRow]:
    """Rows of quantized layers of which only the result is known: no errors, no pictures; the model may be empty."""
    rows = []
    for name, layer in quant_modules(model):
        sides = [getattr(layer, side, None) for side in ("inputs", "outputs")]
        inputs, outputs = (None if found is None else str(found.quantizer) for found in sides)
        for part, module in layer.named_modules():
            if isinstance(module, Packed):
                found = module.qtensor()
                rows.append(
                    LayerRow(
                        name=f"{name}.{part}".removesuffix(".weight"),
                        shape=tuple(found.shape),
                        weights=line_of(found, None, ""),
                        inputs=inputs,
                        outputs=outputs,
                        bits=found.bits_per_element(),
                        sqnr=None,
                        error=None,
                        rtn_error=None,
                    )
                )
    return rows


def _row(state: BlockState, name: str, record: Record) -> LayerRow:
    target, found, matrix = record.target, None, None
    packed = state.installed(target)
    weights = [] if packed is None else [m.qtensor() for m in packed.modules() if isinstance(m, Packed)]
    if weights:
        found = weights[record.number]
        stored = state.matrix(target)
        matrix = (stored[record.number] if target.kind.fused else stored).float()
    error, rtn_error = record.error, record.rtn_error
    if record.changed and found is not None and matrix is not None:
        error, rtn_error = _measured(matrix, found, record)
    quantizer, params = record.inputs
    scale, shifts = None if params is None else params.scale, None
    if isinstance(scale, Factored) and quantizer is not None:
        kept = quantizer.granularity.store([dense(factor) for factor in scale.factors])
        scale = kept["scale"]
        shifts = tuple(torch.bincount(kept["shifts"].long()).tolist()) if "shifts" in kept else None
    return LayerRow(
        name=f"{state.prefix}{name}",
        shape=target.shape if target.matrices else (0,),
        weights=None if found is None else line_of(found, record.quantizer, str(record.stored)),
        inputs=None if quantizer is None else str(quantizer),
        outputs=None if target.rule.outputs is None else str(target.rule.outputs),
        bits=found.bits_per_element() if found is not None else 16.0 if target.matrices else 0.0,
        sqnr=None if found is None or matrix is None else sqnr_of(matrix, found),
        error=error,
        rtn_error=rtn_error,
        input_scale=float(scale.max()) if isinstance(scale, Tensor) else None,
        input_shifts=shifts,
        clip=_spread(record.clip),
        weight_picture=None if found is None or matrix is None else weight_picture(matrix, found),
        input_picture=None if record.sample is None else input_picture(record.sample, quantizer, params),
        notes=tuple(record.notes),
        learned=record.learned,
    )


def _measured(matrix: Tensor, found: QTensor, record: Record) -> tuple[float, float | None]:
    """Relative output error now, and round-to-nearest's, on the inputs that were kept; without any, of the weight."""
    second = None
    if record.sample is not None:
        x = record.sample.float()
        second = x.mT @ x / len(x) if x.shape[-1] == matrix.shape[-1] else None
    plain = None
    if record.quantizer is not None:
        plain = relative_error(matrix, record.quantizer.quantize(matrix).dequantize(), second)
    return relative_error(matrix, found.dequantize(), second), plain


def line_of(found: QTensor, quantizer: Quantizer | None, stored: str) -> str:
    """What the weight was rounded to, in a line: the quantizer's where the tensor really is of its making.

    Args:
        found: the weight.
        quantizer: asked for, if that is known.
        stored: what a tensor of another kind says of itself, if anything.
    """
    base = found.base if isinstance(found, LowRankSum) else found
    name = "" if base is found else f" + rank {found.a.shape[-1]}" if isinstance(found, LowRankSum) else ""
    if isinstance(base, BlockQTensor):
        fits = quantizer is not None and quantizer.format == base.format and quantizer.granularity == base.granularity
        return (str(quantizer) if fits else f"{base.format.name} {base.granularity}") + name
    return (stored or base.kind) + name


def sqnr_of(matrix: Tensor, found: QTensor) -> float | None:
    """Signal to quantization noise of a weight, dB; None where nothing is lost."""
    lost = relative_error(matrix, found.dequantize(), None)
    return -10 * math.log10(lost) if lost > 0 else None


def _spread(clip: Tensor | None) -> tuple[float, float, float] | None:
    if clip is None:
        return None
    low, middle, high = torch.quantile(clip.float(), torch.tensor([0.0, 0.5, 1.0], dtype=torch.float32)).tolist()
    return low, middle, high


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a run did: rows for layers, and the manifest that says with what.

    Attributes:
        layers: one a weight. manifest: model, recipe, data hashes, versions. seconds: wall time of the quantization.
        evaluation: metrics by name after quantization (and of the float model under ``float``).
        times: seconds of what was learned, by the window's name, in order.
        exported: what was written for targets beside the folder, as :func:`nybble.export` answers.
    """

    layers: tuple[LayerRow, ...]
    manifest: dict[str, Any]
    seconds: float
    evaluation: dict[str, Any] | None = None
    times: dict[str, list[float]] = field(default_factory=dict)
    exported: tuple[dict[str, Any], ...] = ()

    def worst(self, count: int = 5) -> list[LayerRow]:
        """The layers with the largest relative error."""
        return sorted(self.layers, key=lambda row: -(row.error or 0.0))[:count]

    @property
    def bits(self) -> float:
        """Stored bits a quantized weight, scales included."""
        total = sum(math.prod(row.shape) for row in self.layers)
        return sum(row.bits * math.prod(row.shape) for row in self.layers) / total if total else 16.0
