"""The description of a quantized model in config.json: what it holds, which versions of it this nybble reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from nybble.core.errors import FileError, UsageError
from nybble.core.versions import VERSION
from nybble.nn.kinds import describe, kind_of_entry, prepare_quantized, quant_modules, restore
from nybble.nn.kv_model import KVRecord, recorded_kv, to_json, use_quantized_cache
from nybble.nn.layouts import Layouts

FORMAT_VERSION = 1


def check_version(quantization: Mapping[str, Any]) -> None:
    """Raise FileError unless this nybble reads the format version of a ``quantization_config`` and it has its parts."""
    version = quantization.get("format_version", FORMAT_VERSION)
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise FileError(
            f"the file has nybble format version {version!r:.80}; this nybble reads up to {FORMAT_VERSION}. "
            "Update nybble."
        )
    if not isinstance(quantization.get("modules"), dict) or not isinstance(quantization.get("layouts"), list):
        raise FileError("quantization_config lacks 'modules' or 'layouts': this is not a checkpoint that nybble wrote.")


def quantization_config(modules: dict[str, Any], layouts: Layouts, kv: KVRecord | None = None) -> dict[str, Any]:
    """``quantization_config`` of config.json; without the key ``kv`` the model caches in float."""
    found = {
        "quant_method": "nybble",
        "format_version": FORMAT_VERSION,
        "nybble_version": VERSION,
        "layouts": layouts.entries,
        "modules": modules,
    }
    return found if kv is None else {**found, "kv": to_json(kv)}


def describe_model(model: nn.Module) -> dict[str, Any]:
    """``quantization_config`` of a model with quantized modules."""
    layouts = Layouts()
    modules = {name: describe(module, layouts) for name, module in quant_modules(model)}
    return quantization_config(modules, layouts, recorded_kv(model))


def restore_model(
    model: nn.Module, modules: Mapping[str, Any], layouts: list[dict[str, Any]], kv: KVRecord | None = None
) -> None:
    """Put empty quantized modules, on the meta device, where the float ones of a model stand, and let it call them.

    Args:
        model: as its config says.
        modules: name -> description, from a file that may say anything.
        layouts: what the descriptions number.
        kv: what the model caches in.

    Raises:
        FileError: a malformed description. ModelError: the model has no such module, or can't cache so.
    """
    known = Layouts(layouts)
    with torch.device("meta"):
        # Those that read another come after it, in whatever order the file has them (transformers sorts config.json).
        for name, entry in sorted(modules.items(), key=lambda item: kind_of_entry(*item).reads_another):
            restore(model, name, entry, known)
    prepare_quantized(model)
    try:
        use_quantized_cache(model, kv)
    except UsageError as error:  # the file's request, not the caller's
        raise FileError(f"the KV cache of this checkpoint: {error}") from error


def renumber(entry: dict[str, Any], numbers: list[int]) -> dict[str, Any]:
    """A module's description with other numbers of layouts: ``numbers[n]`` in place of n."""
    found = dict(entry)
    if "weight" in found:
        found["weight"] = numbers[found["weight"]]
    if "weights" in found:
        found["weights"] = [numbers[n] for n in found["weights"]]
    return found
