"""Whether a model can be kept as compressed-tensors: others load it, and nybble gets back what it wrote, bit for bit.

That asks for more than the target of that name does. Nothing may be stored twice or grow beyond the width of a scale,
tensors keep their names, and inputs that are measured while the model runs are measured as runtimes do it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from nybble.export import Refusal, get_target
from nybble.export._ct_layers import placed
from nybble.export._ct_tensors import scale_of
from nybble.export._ct_verify import how_opened
from nybble.export._names import as_stored
from nybble.export._source import Layer, Source
from nybble.models.sources.layouts._ct_args import E4M3, in_words, is_mx, is_nvfp4
from nybble.nn.activation import ActivationQuantizer
from nybble.qtensor import QTensor
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer
from nybble.scales.absmax import AbsMax
from nybble.scales.minmax import MinMax
from nybble.scales.pow2 import Pow2

TARGET = "compressed-tensors"


def lacking(source: Source) -> list[Refusal]:
    """What of a quantized model can't be kept so; headers and small tensors are read."""
    if found := get_target(TARGET).check(source):
        return found
    checks: tuple[Callable[[Source, Layer], Refusal | None], ...] = (_kind, _weights, _inputs)
    said: dict[tuple[str, str, str], list[str]] = {}
    for name, layer in source.layers.items():
        for check in checks:
            refusal = check(source, layer)
            if refusal is not None:
                said.setdefault((refusal.came, refusal.nearest, refusal.why), []).append(name)
    found = [
        Refusal(layers=tuple(names), came=came, nearest=nearest, why=why)
        for (came, nearest, why), names in said.items()
    ]
    return found or [*_names(source), *_opened(source)]


def _refusal(came: str, nearest: str, why: str) -> Refusal:
    return Refusal(layers=(), came=came, nearest=nearest, why=why)


def _kind(source: Source, layer: Layer) -> Refusal | None:
    if layer.kind.reads_another:
        return _refusal("a head that reads the embedding's table", "embeddings in float", "it would be stored twice")
    if layer.kind.fused:
        return _refusal("fused experts", "experts in float, or `nybble export`", "they would be stored apart")
    return None


def _weights(source: Source, layer: Layer) -> Refusal | None:
    for prefix, weight in layer.weights.items():
        assert isinstance(weight, BlockQTensor)  # or it was refused
        if not isinstance(weight.params.scale, QTensor):
            continue
        if not (is_mx(weight) or is_nvfp4(weight)) or weight.format.is_integer or scale_of(weight).layout != "dense":
            why = "scales that are quantized themselves would be stored in float32"
            return _refusal(in_words(weight), "scale_format=float32", why)
        outer = scale_of(weight).params.scale
        if isinstance(outer, torch.Tensor) and _fraction(source.tensor(f"{prefix}.scale.scale")) != 0.5:
            return _refusal("NVFP4 over a factor", "nvfp4-ct, or --target compressed-tensors", "files keep a divisor")
    return None


def _fraction(value: torch.Tensor) -> float:
    """0.5 of a power of two."""
    return math.frexp(value.float().item())[0]


def _inputs(source: Source, layer: Layer) -> Refusal | None:
    for quantizer in _measured(layer):
        if not _as_runtimes(quantizer):
            why = "runtimes measure inputs by their own rule"
            return _refusal(f"inputs {quantizer}", "--target compressed-tensors, which takes that rule", why)
    return None


def _measured(layer: Layer) -> Iterator[Quantizer]:
    sides: tuple[ActivationQuantizer | None, ...] = (layer.inputs, layer.outputs)
    yield from (side.quantizer for side in sides if side is not None and not side.quantizer.static)


def _as_runtimes(quantizer: Quantizer) -> bool:
    """Whether a scale that is measured comes of the range alone, as every runtime finds it."""
    rule, fmt = quantizer.scale, quantizer.format
    if isinstance(rule, Pow2):
        return rule.mode == ("rceil" if fmt.name == E4M3 else "even")
    if isinstance(rule, AbsMax):
        return rule.target in (0, fmt.absmax, (2**fmt.bits - 1) / 2 if fmt.is_integer else 0)
    return isinstance(rule, MinMax) and not rule.has_offset


def _names(source: Source) -> list[Refusal]:
    """Where a checkpoint of the family has other names than the model, or tensors of another form."""
    model: Any = source.skeleton()
    floats = {name: source.copied(name) for name in source.floats}
    stored = as_stored(model, floats, source.tensor)
    moved = [name for name in floats if name not in stored or stored[name].shape != floats[name].shape]
    moved += [place.at for place in placed(source, model) if place.name != place.at]
    if not moved:
        return []
    why = "checkpoints of this family keep them under other names, or in another form"
    return [Refusal(layers=tuple(moved), came="names of the model", nearest="`nybble export`", why=why)]


def _opened(source: Source) -> list[Refusal]:
    why, _ = how_opened(source, placed(source, source.skeleton()))
    if not why:
        return []
    return [Refusal(layers=tuple(source.layers), came="the whole", nearest="`nybble export`, for vLLM", why=why)]
