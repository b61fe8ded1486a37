"""Whether a model can be kept as compressed-tensors: others load it, and nybble gets back what it wrote, bit for bit.

That asks for more than the target of that name does. Nothing may be stored twice or grow beyond the width of a scale,
tensors keep their names, and inputs that are measured while the model runs are measured as runtimes do it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from nybble.core.errors import SchemeError
from nybble.export import Facts, Refusal, get_target
from nybble.export._ct_constrain import MOST_ROWS, constrained
from nybble.export._ct_layers import placed
from nybble.export._ct_tensors import scale_of
from nybble.export._ct_verify import how_opened
from nybble.export._names import as_stored
from nybble.export._source import Layer, Source
from nybble.models.sources.layouts._ct_args import E4M3, in_words, is_mx, is_nvfp4
from nybble.nn.kinds import Kind
from nybble.qtensor import QTensor
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer
from nybble.scales.absmax import AbsMax
from nybble.scales.minmax import MinMax
from nybble.scales.pow2 import Pow2
from nybble.scheme import Scheme

TARGET = "compressed-tensors"


def lacking(source: Source) -> list[Refusal]:
    """What of a quantized model can't be kept so; headers and small tensors are read."""
    if found := get_target(TARGET).check(source):
        return found
    checks: tuple[Callable[[Source, Layer], Refusal | None], ...] = (_layer_kind, _weights, _inputs)
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


def kept_to_form(scheme: Scheme, facts: Facts) -> Scheme:
    """The scheme whose result can be kept so, as far as a scheme says: what steps make of it is seen at the end.

    Raises:
        SchemeError: a rule asks for what can't be; names the nearest.
    """
    made = constrained(scheme, facts)
    text = facts.config.get("text_config")
    tied = any(c.get("tie_word_embeddings") for c in (facts.config, text if isinstance(text, dict) else {}))
    for name, rule in made.match(facts.classes).rules.items():
        target = facts.targets[name]
        weights = rule.weights
        refusal = None if weights is None else _kind(target.kind, tied and "Embedding" in target.kind.classes)
        if weights is not None and refusal is None:
            rows, columns = target.shape
            trial = weights.quantize(torch.ones(min(rows, MOST_ROWS), columns))
            refusal = _scales(trial, partial(trial.tensors().__getitem__, "scale.scale"))
        asked = [side for side in (rule.inputs, rule.outputs) if side is not None]
        refusal = refusal or next((found for side in asked if (found := _side(side)) is not None), None)
        if refusal is not None:
            raise SchemeError(f"the form {TARGET} can't hold {replace(refusal, layers=(name,))}.")
    return made


def _refusal(came: str, nearest: str, why: str) -> Refusal:
    return Refusal(layers=(), came=came, nearest=nearest, why=why)


def _layer_kind(source: Source, layer: Layer) -> Refusal | None:
    return _kind(layer.kind, layer.kind.reads_another)


def _kind(kind: Kind, reads_another: bool) -> Refusal | None:
    if reads_another:
        return _refusal("a head that reads the embedding's table", "embeddings in float", "it would be stored twice")
    if kind.unrotated is not kind:
        why = "transformers leaves transform_config out without a word"
        return _refusal("an online rotation of inputs", "--target compressed-tensors, for vLLM", why)
    if kind.fused:
        return _refusal("fused experts", "experts in float, or `nybble export`", "they would be stored apart")
    return None


def _weights(source: Source, layer: Layer) -> Refusal | None:
    for prefix, weight in layer.weights.items():
        assert isinstance(weight, BlockQTensor)  # or it was refused
        refusal = _scales(weight, partial(source.tensor, f"{prefix}.scale.scale"))
        if refusal is not None:
            return refusal
    return None


def _scales(weight: BlockQTensor, factor: Callable[[], torch.Tensor]) -> Refusal | None:
    """Of scales that are quantized themselves; ``factor``: reads the number above them."""
    if not isinstance(weight.params.scale, QTensor):
        return None
    if not (is_mx(weight) or is_nvfp4(weight)) or weight.format.is_integer or scale_of(weight).layout != "dense":
        why = "scales that are quantized themselves would be stored in float32"
        return _refusal(in_words(weight), "scale_format=float32", why)
    if isinstance(scale_of(weight).params.scale, torch.Tensor) and _fraction(factor()) != 0.5:
        return _refusal("NVFP4 over a factor", "nvfp4-ct, or --target compressed-tensors", "files keep a divisor")
    return None


def _fraction(value: torch.Tensor) -> float:
    """0.5 of a power of two."""
    return math.frexp(value.float().item())[0]


def _inputs(source: Source, layer: Layer) -> Refusal | None:
    sides = [side.quantizer for side in (layer.inputs, layer.outputs) if side is not None]
    return next((found for side in sides if (found := _side(side)) is not None), None)


def _side(quantizer: Quantizer) -> Refusal | None:
    if quantizer.static or _as_runtimes(quantizer):
        return None
    why = "runtimes measure inputs by their own rule"
    return _refusal(f"inputs {quantizer}", "--target compressed-tensors, which takes that rule", why)


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
