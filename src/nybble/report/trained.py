"""What training came to, layer by layer: rows of the packed model, with what its weights were before they were packed.

start = start_of(model)              # prepared, before the first update
...
facts = facts_of(model, start)       # trained, not packed yet
rows = trained_rows(convert(model), facts)
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.curve import short
from nybble.nn.twin import FakeWeight, Twin
from nybble.qtensor import QTensor
from nybble.qtensor.block import BlockQTensor
from nybble.qtensor.low_rank_sum import LowRankSum
from nybble.qtensor.outer_scaled import OuterScaled
from nybble.quantizer import Quantizer
from nybble.reconstruction.moves import ratios
from nybble.report.portrait import weight_picture
from nybble.report.record import LayerRow, described_rows, line_of, sqnr_of
from nybble.training.learners import LearningScales


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where training began: weights as they would be packed, scales of what enters layers; by module."""

    weights: dict[str, QTensor] = field(default_factory=dict)
    inputs: dict[str, Tensor | QTensor] = field(default_factory=dict)


@torch.no_grad()
def start_of(model: nn.Module) -> Start:
    """Before the first update; of a model in which nothing is learned an empty one."""
    weights = {
        name: copy.deepcopy(packed) for name, packed, _, _ in _weights(model, begun=True)
    }  # a part may hand out what it trains
    return Start(weights=weights, inputs=_inputs(model))


@torch.no_grad()
def facts_of(model: nn.Module, start: Start) -> dict[str, dict[str, Any]]:
    """Fields of :class:`~nybble.report.record.LayerRow` by its name, behind the last update.

    ``learned`` has ``codes``, the share of weights whose code is another than at the start, and of ``scales`` and
    ``input_scales`` the smallest, median and largest ratio to what they were. ``sqnr`` is that of the trained float
    weights.
    """
    found: dict[str, dict[str, Any]] = {}
    inputs = _inputs(model)
    for name, packed, latent, quantizer in _weights(model, begun=False):
        layer = name.removesuffix(".weight")
        learned = _moved(start.weights.get(name), packed)
        if layer in inputs and layer in start.inputs:
            learned |= ratios("input_scales", start.inputs[layer], inputs[layer])
        drawn = packed.dequantize() if latent is None else latent
        facts: dict[str, Any] = {
            "learned": learned or None,
            "weight_picture": weight_picture(drawn, packed, latent is not None),
        }
        if latent is not None:
            facts |= {"sqnr": sqnr_of(latent, packed), "weights": line_of(packed, quantizer, "")}
        found[layer] = facts
    return found


def trained_rows(model: nn.Module, facts: Mapping[str, Mapping[str, Any]]) -> list[LayerRow]:
    """Rows of the packed model with these facts."""
    return [replace(row, **facts.get(row.name, {})) for row in described_rows(model)]


def _weights(model: nn.Module, begun: bool) -> Iterator[tuple[str, QTensor, Tensor | None, Quantizer | None]]:
    """Module, weight as it would be packed, the float one and its quantizer where that trains."""
    for name, module in model.named_modules():
        if isinstance(module, FakeWeight) and module.learned is not None:
            yield name, module.packed(), module.latent.detach(), module.learned.quantizer
        elif isinstance(module, LearningScales):
            yield name, module.began if begun else module.settled().qtensor(), None, None


def _inputs(model: nn.Module) -> dict[str, Tensor | QTensor]:
    """Copies of the scales of what enters layers, where they don't depend on it."""
    found: dict[str, Tensor | QTensor] = {}
    for name, module in model.named_modules():
        for role, learned in module.learned() if isinstance(module, Twin) else ():
            params = learned.fixed() if role == "inputs" else None
            if params is not None and isinstance(params.scale, Tensor):
                found[name] = params.scale.detach().clone()
    return found


def _moved(was: QTensor | None, now: QTensor) -> dict[str, Any]:
    was, now = _base(was), _base(now)
    if not isinstance(was, BlockQTensor) or not isinstance(now, BlockQTensor) or was.format != now.format:
        return {}
    codes = short(float((was.unpacked() != now.unpacked()).float().mean()))
    return {"codes": codes, **ratios("scales", was.params.scale, now.params.scale)}


def _base(found: QTensor | None) -> Any:
    return found.base if isinstance(found, OuterScaled | LowRankSum) else found
