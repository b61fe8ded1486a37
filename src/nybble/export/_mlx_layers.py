"""Where a model's layers stand in a folder of mlx-lm, and what config.json says there.

Models of mlx-lm have the names of transformers' checkpoints; of experts, which those have apart, they make one tensor
under ``switch_mlp``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from nybble.export._mlx_form import form_of
from nybble.export._mlx_tensors import Piece, Placed
from nybble.export._modules import check_apart, check_module
from nybble.export._names import parts_of
from nybble.export._source import Layer, Source
from nybble.models.sources.layouts._ct_args import CannotError
from nybble.nn.kinds.tied import input_table

_EXPERT = re.compile(r"(.*)\.experts\.(\d+)\.(\w+)\.weight")
_LEAVES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def placed(source: Source, model: Any, layer: Layer) -> list[Placed]:
    """The modules of mlx-lm that a layer becomes; none of a head that reads the embedding's table, as it does there.

    Raises:
        CannotError: MLX has no place for it, or packs nothing so.
    """
    _check_kind(source, model, layer)
    if layer.kind.reads_another:
        return []
    forms = {str(form_of(weight, layer.kind.fused)): weight for weight in layer.weights.values()}
    if len(forms) > 1:
        raise CannotError("experts in different formats", "one format for all experts of a layer")
    form = form_of(next(iter(layer.weights.values())), layer.kind.fused)
    if not layer.kind.fused:
        (prefix,) = layer.weights
        path = _path(model, layer)
        return [Placed(source, path, layer, form, (Piece(prefix),), stacked=False)]
    return [Placed(source, path, layer, form, pieces, stacked=True) for path, pieces in _experts(model, layer)]


def _check_kind(source: Source, model: Any, layer: Layer) -> None:
    """Raise CannotError for modules that mlx-lm doesn't quantize."""
    if layer.inputs is not None or layer.outputs is not None:
        raise CannotError("quantized activations", "weights alone (--activations none)", "MLX's files keep none")
    if layer.kind.operands:
        raise CannotError("the operands of attention", "--matmuls left out")
    if layer.kind.fused:
        return
    module = model.get_submodule(layer.name)
    if layer.kind.reads_another:
        table = str(layer.entry.get("table", "")) or input_table(model)
        if not isinstance(module, nn.Linear) or table != input_table(model):
            raise CannotError("a table that several embeddings read", "embeddings in float")
        return
    check_module(module)


def _path(model: Any, layer: Layer) -> str:
    rows = next(iter(layer.weights.values())).shape[0]
    parts = parts_of(model, f"{layer.name}.weight", 0, rows, transposed=False)
    if len(parts) != 1 or parts[0].rows is not None:
        raise CannotError("a layer that its family's checkpoints keep in parts", f"{layer.name} in float")
    return parts[0].name.removesuffix(".weight")


def _experts(model: Any, layer: Layer) -> Iterator[tuple[str, tuple[Piece, ...]]]:
    prefixes = list(layer.weights)
    rows = layer.weights[prefixes[0]].shape[0]
    found: dict[str, dict[int, Piece]] = {}
    transposed = bool(layer.entry.get("transposed", False))
    check_apart(model, layer.name, len(prefixes), rows, transposed)
    for part in parts_of(model, layer.name, len(prefixes), rows, transposed):
        match = _EXPERT.fullmatch(part.name)
        if match is None:
            raise CannotError("experts under names that mlx-lm does not know", "experts in float (--ignore Experts)")
        leaf = _LEAVES.get(match[3], match[3])
        piece = Piece(prefixes[part.matrix], part.rows)
        found.setdefault(f"{match[1]}.switch_mlp.{leaf}", {})[int(match[2])] = piece
    for path, pieces in found.items():
        yield path, tuple(pieces[number] for number in range(len(prefixes)))


# ---------------------------------------------------------------------------------------------------------- config.json
def quantization(places: Sequence[Placed]) -> dict[str, Any]:
    """``quantization``: what most modules are, and by name the others."""
    said = [place.said for place in places]
    if not said:
        return {}
    most = max(said, key=said.count)
    others = {place.path: one for place, one in zip(places, said, strict=True) if one != most}
    return {**most, **others}


def as_read(config: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """config.json with the older keys beside those of transformers 5, which mlx-lm doesn't know for all families.

    Without ``rope_theta`` it would take its own, and without a word say something else.
    """
    found = dict(config)
    for alias, name in getattr(type(model.config), "attribute_map", {}).items():
        if name in config:
            found.setdefault(alias, config[name])
    rope = config.get("rope_parameters")
    if isinstance(rope, dict):
        kinds = {key: value for key, value in rope.items() if isinstance(value, dict)}
        found = {**_rope(kinds.get("full_attention", {}) if kinds else rope), **found}
        local = kinds.get("sliding_attention", {}).get("rope_theta")
        if local is not None:
            found.setdefault("rope_local_base_freq", local)
    types = config.get("layer_types")
    if isinstance(types, list) and "full_attention" in types and "sliding_attention" in types:
        pattern = types.index("full_attention") + 1
        if all((kind == "full_attention") == ((i + 1) % pattern == 0) for i, kind in enumerate(types)):
            found.setdefault("sliding_window_pattern", pattern)
    return found


def _rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return kept
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    return {**kept, "rope_scaling": {**scaling, "type": kind}}
