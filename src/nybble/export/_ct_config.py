"""``quantization_config`` of config.json, as compressed-tensors' own classes write it; without that library.

Source: compressed-tensors 0.20 (``quantization/quant_config.py``, ``quantization/quant_scheme.py``,
``quantization/quant_args.py``, ``compressors/format.py``); tests compare with what these make of the same arguments.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nybble.export._ct_transforms import KEY, transform_config
from nybble.models.build.skeleton import has_optional_pooler, meta_model

if TYPE_CHECKING:
    from nybble.export._ct_layers import Placed
    from nybble.export._source import Source

SCHEMA = "0.20.0"
"""The version of compressed-tensors whose schema and files these are. Before 0.20, integers of 3, 5, 6 and 7 bits were
words with unused bits; from it on they are one stream."""
_BLOCKS = {(4, 32): "mxfp4-pack-quantized", (6, 32): "mxfp6-pack-quantized", (4, 16): "nvfp4-pack-quantized"}
_ARGS = ("num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "scale_dtype")
_UNSAID = ("block_structure", "scale_dtype")
"""Left out where they are None."""


def form_of(scheme: Mapping[str, Any]) -> str:
    """The format that the library itself would save a linear layer of this scheme in."""
    weights, inputs = scheme.get("weights"), scheme.get("input_activations")
    if weights is None:
        return "dense"
    if weights["type"] == "int":
        return "pack-quantized" if inputs is None else "int-quantized"
    bits, group = weights["num_bits"], weights.get("group_size")
    if (bits, group) in _BLOCKS:
        return _BLOCKS[bits, group]
    if (bits, group, weights.get("scale_dtype")) == (8, 32, torch.uint8):
        return "mxfp8-quantized"
    return "naive-quantized" if inputs is None else "float-quantized"


def quantization_config(source: Source, places: Sequence[Placed], kv: Mapping[str, Any] | None) -> dict[str, Any]:
    """As the library's own ``update_config`` writes it.

    Args:
        source: what is written.
        places: its quantized modules.
        kv: arguments of the KV cache.
    """
    groups: list[dict[str, Any]] = []
    members: list[list[Placed]] = []
    for place in places:
        if place.scheme not in groups:
            groups.append(place.scheme)
            members.append([])
        members[groups.index(place.scheme)].append(place)
    layers = [scheme for scheme, who in zip(groups, members, strict=True) if any(not p.embedding for p in who)]
    forms = {scheme["format"] for scheme in groups}
    return {
        "version": SCHEMA,
        "quant_method": "compressed-tensors",
        "sparsity_config": {},
        KEY: transform_config(source),
        "config_groups": {
            f"group_{i}": _group(_targets(who, len(layers) == 1), scheme)
            for i, (scheme, who) in enumerate(zip(groups, members, strict=True))
        },
        "kv_cache_scheme": _args(kv),
        "format": "mixed-precision" if len(forms) > 1 else next(iter(forms), "dense"),
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": _ignored(source, source.skeleton(), places),
        "moe_sparsity_config": None,
    }


def _group(targets: list[str], scheme: Mapping[str, Any]) -> dict[str, Any]:
    """A QuantizationScheme, as it is dumped."""
    sides = ("weights", "input_activations", "output_activations")
    return {"targets": targets, **{side: _args(scheme.get(side)) for side in sides}, "format": scheme["format"]}


def _args(args: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """QuantizationArgs, as they are dumped."""
    if args is None:
        return None
    found = {name: args.get(name) for name in _ARGS if name not in _UNSAID or args.get(name) is not None}
    return {name: str(value) if isinstance(value, torch.dtype) else value for name, value in found.items()}


def _targets(places: Sequence[Placed], only: bool) -> list[str]:
    """Names of the modules that a scheme is for; ``only``: there is no other, so the class will do."""
    found = [place.at or place.name for place in places if place.embedding]
    layers = [place for place in places if not place.embedding]
    if only and layers:
        return ["Linear", *found]
    experts: dict[str, set[str]] = {}
    for place in layers:
        cut = re.fullmatch(r"(.*)\.\d+\.([^.]+)", place.name)
        if place.at or cut is None:
            found += dict.fromkeys([place.at or place.name, place.name])
        else:
            experts.setdefault(cut[1], set()).add(cut[2])
    return [*found, *(rf"re:{re.escape(at)}\.\d+\.({'|'.join(sorted(leaf))})" for at, leaf in experts.items())]


def _ignored(source: Source, model: nn.Module, places: Sequence[Placed]) -> list[str]:
    """Names of the modules with a matrix that stays in float."""
    taken = {name for place in places for name in (place.at, place.name)}
    # Others build an optional pooler whether the files have it or not, and would pack one that nobody quantized.
    whole: nn.Module = model
    if has_optional_pooler(source.transformers_config):
        whole = meta_model(source.transformers_config, source.dtype, [*source.floats, *source.layers, "pooler."])
    linear = [name for name, module in whole.named_modules() if isinstance(module, nn.Linear)]
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    stored = [
        name.removesuffix(".weight")
        for name, entry in source.floats.items()
        if name.endswith(".weight") and len(entry.shape) == 2 and name not in tables
    ]
    return [name for name in dict.fromkeys([*linear, *stored]) if name not in taken]
