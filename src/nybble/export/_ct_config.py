"""``quantization_config`` of config.json, by the classes of compressed-tensors itself."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from torch import nn

from nybble.core.errors import UsageError
from nybble.models.build.skeleton import meta_model

if TYPE_CHECKING:
    from nybble.export._ct_layers import Placed
    from nybble.export._source import Source

NEEDS = ("compressed-tensors", "transformers")
OLDEST = (0, 20)
"""From it on, integers of 3, 5, 6 and 7 bits are one stream of bits; before, words with unused ones."""


@contextmanager
def quietly() -> Iterator[None]:
    """Without the warnings of other libraries, at import and after."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@cache
def library() -> Any:
    """The module ``compressed_tensors``.

    Raises:
        UsageError: it is missing or too old.
    """
    wanted = f"pip install 'compressed-tensors>={OLDEST[0]}.{OLDEST[1]}'"
    try:
        found = version("compressed-tensors")
    except PackageNotFoundError:
        raise UsageError(f"this target needs the package compressed-tensors: {wanted}") from None
    numbers = tuple(int(number) for number in re.findall(r"\d+", found)[:2])
    if numbers < OLDEST:
        raise UsageError(f"compressed-tensors {found} is too old, its packed integers differ: {wanted}")
    with quietly():
        import compressed_tensors
        import compressed_tensors.compressors
        import compressed_tensors.quantization
    return compressed_tensors


def form_of(scheme: Mapping[str, Any]) -> str:
    """The format that the library itself would save a linear layer of this scheme in."""
    found = library()
    with quietly():
        made = found.quantization.QuantizationScheme(targets=["Linear"], **scheme)
        form: str = found.compressors.format.infer_module_format(nn.Linear, made).value
    return form


def quantization_config(source: Source, places: Sequence[Placed], kv: Mapping[str, Any] | None) -> dict[str, Any]:
    """As the library's own ``update_config`` writes it.

    Args:
        source: what is written.
        places: its quantized modules.
        kv: arguments of the KV cache.
    """
    found = library()
    model = source.skeleton()
    groups: list[dict[str, Any]] = []
    members: list[list[Placed]] = []
    for place in places:
        if place.scheme not in groups:
            groups.append(place.scheme)
            members.append([])
        members[groups.index(place.scheme)].append(place)
    layers = [scheme for scheme, who in zip(groups, members, strict=True) if any(not p.embedding for p in who)]
    with quietly():
        schemes = {
            f"group_{i}": found.quantization.QuantizationScheme(targets=_targets(who, len(layers) == 1), **scheme)
            for i, (scheme, who) in enumerate(zip(groups, members, strict=True))
        }
        forms = {scheme["format"] for scheme in groups}
        config = found.quantization.QuantizationConfig(
            config_groups=schemes,
            format="mixed-precision" if len(forms) > 1 else next(iter(forms), "dense"),
            quantization_status="compressed",
            kv_cache_scheme=None if kv is None else found.quantization.QuantizationArgs(**kv),
            ignore=_ignored(source, model, places),
        ).model_dump(mode="json", exclude={"quant_method"})
    return {
        "version": found.__version__,
        "quant_method": "compressed-tensors",
        "sparsity_config": {},
        "transform_config": {},
        **config,
    }


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
    whole = meta_model(source.transformers_config, source.dtype, [*source.floats, *source.layers, "pooler."])
    linear = [name for name, module in whole.named_modules() if isinstance(module, nn.Linear)]
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    stored = [
        name.removesuffix(".weight")
        for name, entry in source.floats.items()
        if name.endswith(".weight") and len(entry.shape) == 2 and name not in tables
    ]
    return [name for name in dict.fromkeys([*linear, *stored]) if name not in taken]
