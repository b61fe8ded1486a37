"""The description of a quantized model in config.json: what it holds, which versions of it this nybble reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from nybble.core.errors import FileError, ModelError, UsageError
from nybble.core.versions import VERSION
from nybble.nn.kinds import describe, kind_of_entry, prepare_quantized, quant_modules, restore_all
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
    restore_all(model, modules, Layouts(layouts))
    prepare_quantized(model)
    try:
        use_quantized_cache(model, kv)
    except UsageError as error:  # the file's request, not the caller's
        raise FileError(f"the KV cache of this checkpoint: {error}") from error


def fit_to(model: Any, modules: Mapping[str, Any]) -> dict[str, Any]:
    """The descriptions of a folder's modules for a model of the same family with another head, or with none.

    As transformers does with a float folder's tensors, names get or lose the base model's prefix, and what a head of
    the folder has that the model hasn't is left out.

    Args:
        model: as transformers built it.
        modules: name in the folder -> description, from a file that may say anything.

    Raises:
        FileError: a malformed description. ModelError: nothing of it fits.
    """
    found: dict[str, Any] = {}
    base = getattr(model, model.base_model_prefix, model)
    bare = base is model and any(name.startswith(f"{model.base_model_prefix}.") for name in modules)
    for name, entry in modules.items():
        kind = kind_of_entry(name, entry)
        place = next((place for place in places(model, name) if _has(model, kind.holder(place))), None)
        if bare and place == name and not kind.claims(model.get_submodule(kind.holder(place))):
            continue  # a head's, which has a name that the base model has too (WavLMForXVector's feature_extractor)
        if place is not None:
            found[place] = _reading(model, entry)
        elif any(place.partition(".")[0] in base._modules for place in places(model, name)):
            found[name] = entry  # of the base model, so it should be there: restoring says that it isn't
    if modules and not found:
        raise ModelError(f"the checkpoint quantizes {next(iter(modules))}, and {type(model).__name__} has none of it.")
    return found


def _reading(model: Any, entry: dict[str, Any]) -> dict[str, Any]:
    """The entry, with the name here of the module whose table it reads."""
    table = entry.get("table")
    if not isinstance(table, str):
        return entry
    return entry | {"table": next((place for place in places(model, table) if _has(model, place)), table)}


def fit_cache(model: Any, kv: Any) -> Any:
    """What config.json says of the cache, for a model with another head: none for one that generates nothing."""
    if not model.can_generate():
        return None
    if not isinstance(kv, dict):
        return kv
    return {next((p for p in places(model, name) if _has(model, p)), name): line for name, line in kv.items()}


def places(model: Any, name: str) -> tuple[str, ...]:
    """Where a module of a folder may be: there, or with or without the base model's prefix."""
    prefix = f"{model.base_model_prefix}."
    return name, f"{prefix}{name}", name.removeprefix(prefix)


def _has(model: nn.Module, path: str) -> bool:
    try:
        return bool(path) and isinstance(model.get_submodule(path), nn.Module)
    except AttributeError:
        return False


def renumber(entry: dict[str, Any], numbers: list[int]) -> dict[str, Any]:
    """A module's description with other numbers of layouts: ``numbers[n]`` in place of n."""
    found = dict(entry)
    if "weight" in found:
        found["weight"] = numbers[found["weight"]]
    if "weights" in found:
        found["weights"] = [numbers[n] for n in found["weights"]]
    return found
