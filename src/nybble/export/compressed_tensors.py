"""compressed-tensors folders, which vLLM serves, and transformers opens with that library.

Every code and scale is written as it is: the library's own decoder gives nybble's values. What its schema can't say is
refused. The config is what its own classes would write, and the format of a layer follows its own rule; only --check
needs the library.
Source: compressed-tensors 0.20 (``quantization/quant_args.py``, ``compressors/``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble.core.files import atomic_write_json
from nybble.core.tensorfile import Planned, safetensors_name, stream_tensorfiles
from nybble.export import ExportTarget, Facts, Refusal, Takes, Verified
from nybble.export._ct_config import quantization_config
from nybble.export._ct_constrain import constrained
from nybble.export._ct_layers import Placed, nvfp4_groups, placed, scheme_of, unequal_inputs
from nybble.export._ct_library import NEEDS, library
from nybble.export._ct_takes import TAKES, rows_for
from nybble.export._ct_tensors import divisor_of
from nybble.export._ct_transforms import KEY, rotations, unlike_siblings
from nybble.export._ct_verify import compare_decoded, how_opened
from nybble.export._folder import SHARD_BYTES, head_width, write_beside
from nybble.export._fused import fused_groups
from nybble.export._last_bit import moves, outer_of
from nybble.export._names import as_stored
from nybble.export._source import Source
from nybble.export._transformers import open_and_compare
from nybble.models.sources.layouts._ct_args import CannotError, kv_args
from nybble.nn.kv_model import cache_scales, cached_attentions
from nybble.qtensor.block import BlockQTensor
from nybble.scheme import Scheme

_CARD = """This folder is in the format of [compressed-tensors](https://github.com/vllm-project/compressed-tensors).
{vllm}transformers opens it where the Python package compressed-tensors is installed{dense}. nybble is not needed."""

_ROTATED = f"""This folder is in the format of [compressed-tensors](https://github.com/vllm-project/compressed-tensors),
with rotations of inputs while the model runs (`{KEY}` of config.json). vLLM applies them, and so does nybble.
**transformers leaves them out without a word, and gives other numbers then.**"""


class CompressedTensors(ExportTarget):
    """``pack-quantized`` and its siblings."""

    summary = "safetensors for vLLM, and for transformers with compressed-tensors"
    loses = "nothing; what its schema can't say is refused"
    takes = TAKES
    rotates = True

    def __init__(self, option: str = "") -> None:
        super().__init__(option)
        self._known: tuple[Source, list[Placed]] | None = None

    def _places(self, source: Source) -> list[Placed]:
        """The modules of the folder, worked out once for notes, writing and checking."""
        if self._known is None or self._known[0] is not source:
            self._known = source, placed(source, source.skeleton())
        return self._known[1]

    def require(self, check: bool) -> None:  # noqa: D102
        if check:
            library()

    def constrain(self, scheme: Scheme, facts: Facts) -> Scheme:  # noqa: D102
        return constrained(scheme, facts)

    def check(self, source: Source) -> list[Refusal]:  # noqa: D102
        found: dict[tuple[str, str, str], list[str]] = {}
        schemes: dict[str, dict[str, Any]] = {}
        model = source.skeleton()
        for name, layer in source.layers.items():
            try:
                schemes[name] = scheme_of(source, model, layer)
            except CannotError as error:
                found.setdefault((error.came, error.nearest, error.why), []).append(name)
        refusals = [
            Refusal(layers=tuple(names), came=came, nearest=nearest, why=why)
            for (came, nearest, why), names in found.items()
        ]
        if source.kv is not None:
            try:
                kv_args(source.kv, head_width(source))
                _check_layers(source, model)
            except CannotError as error:
                refusals.append(
                    Refusal(layers=("the KV cache",), came=error.came, nearest=error.nearest, why=error.why)
                )
        return refusals or [*_unequal(source, schemes), *_inexact(source, schemes), *unlike_siblings(source)]

    def notes(self, source: Source) -> list[str]:  # noqa: D102
        model = source.skeleton()
        unserved = [place for place in self._places(source) if not _vllm(place)]
        unserved.sort(key=lambda place: place.embedding)
        lines = []
        if unserved:
            what = "looks up packed embeddings:" if unserved[0].embedding else "takes the scheme of"
            lines.append(f"no vLLM that is known {what} {unserved[0].at or unserved[0].name}")
        if source.kv is not None:
            scales = cache_scales(model, source.kv)
            how = "by one calibrated scale" if scales is None else "by the same scales, k_scale and v_scale"
            how = "without a scale, as here" if scales and all(pair == (1.0, 1.0) for pair in scales.values()) else how
            lines.append(f"others' KV caches: transformers caches in float, vLLM in float8 {how}")
        if rotations(source):
            lines.append(f"transformers leaves {KEY} out without a word, and gives other numbers then; vLLM does it")
        rounded = _narrowed(source)
        if rounded:
            more = f" and {len(rounded) - 1} more" if len(rounded) > 1 else ""
            lines.append(
                f"runtimes keep scales in the model's {str(source.dtype).removeprefix('torch.')}, which rounds those "
                f"of {rounded[0]}{more} (not if quantized with --target compressed-tensors)"
            )
        return lines

    def shifts(self, source: Source) -> list[Refusal]:  # noqa: D102
        bad = []
        for layer in source.layers.values():
            for prefix, weight in layer.weights.items():
                if isinstance(outer_of(weight), Tensor):
                    divisor = divisor_of(source, layer, prefix)
                    if divisor is not None and moves(source, prefix, weight, divisor):
                        bad.append(layer.name)
        why = "under its reciprocal, a divisor, a last bit of values moves"
        found = Refusal(layers=tuple(dict.fromkeys(bad)), came="NVFP4 over a factor", nearest="nvfp4-ct", why=why)
        return [found] if bad else []

    def write(self, source: Source, folder: Path) -> None:  # noqa: D102
        write_beside(source, folder, self.write_model(source, folder))

    def write_model(self, source: Source, folder: Path) -> str:
        """Write weights and config.json alone; returns who loads them, for a card."""
        model = source.skeleton()
        places = self._places(source)
        floats = {name: source.copied(name) for name in source.floats}
        tensors = as_stored(model, floats, source.tensor)
        for place in places:
            tensors |= place.tensors(source)
        for each in rotations(source):
            tensors |= each.tensors()
        tensors |= _kv_scales(source, model)
        config, changed = _config(source, places)
        stream_tensorfiles(tensors, folder / "model.safetensors", {"format": "pt"}, SHARD_BYTES)
        atomic_write_json(folder / "config.json", source.config | changed | {"quantization_config": config})
        served = all(map(_vllm, places))
        if rotations(source):
            return _ROTATED
        return _CARD.format(
            vllm="vLLM serves it as it is: `vllm serve .`; and\n" if served else "",
            dense=", and dequantizes the weights while it loads" if config.get("dequantize") else "",
        )

    def verify(self, folder: Path, source: Source) -> Verified:  # noqa: D102
        places = self._places(source)
        rows = tuple({row: None for place in places for row in _vllm(place)})
        count, exact_in = compare_decoded(folder, source, places)
        why, dequantize = how_opened(source, places)
        if why:
            opened_with = {name: version(name) for name in NEEDS[:1]}
            return Verified(
                opened_with=opened_with, weights=count, exact_in=exact_in, cosine=None, largest=None, uncalled=why,
                runtimes=rows,
            )  # fmt: skip
        return open_and_compare(folder, source, NEEDS, runtimes=rows, dequantize=dequantize)


def _vllm(place: Placed) -> tuple[Takes, ...]:
    """The rows of vLLM that a module is of.

    None of a table, which it looks up in float alone: its pull request 45535 was open in November 2026.
    """
    return () if place.embedding else rows_for(place.scheme, head=place.head)


def _kv_scales(source: Source, model: Any) -> dict[str, Planned]:
    """``k_scale`` and ``v_scale`` of every layer that caches; none where tokens have theirs.

    1 is in the model's dtype, as the library writes it; what was calibrated in float32, which holds it.
    """
    plans: dict[str, Planned] = {}
    for name, pair in (cache_scales(model, source.kv) or {}).items():
        for leaf, scale in zip(("k_scale", "v_scale"), pair, strict=True):
            plans[f"{name}.{leaf}"] = _number(scale, source.dtype if scale == 1 else torch.float32)
    return plans


def _number(value: float, dtype: torch.dtype) -> Planned:
    held = torch.full((1,), value, dtype=dtype)
    return Planned(dtype=str(safetensors_name(dtype)), shape=(1,), bytes_from=lambda: held)


def _check_layers(source: Source, model: Any) -> None:
    """Raise CannotError where only some layers cache in few bits: the files have one word for all."""
    if isinstance(source.kv, Mapping) and len(source.kv) < len(cached_attentions(model)):
        came = f"KV cache {next(iter(source.kv.values()))}"
        raise CannotError(came, "one cache for all layers, or the cache in float", "some layers cache in float")


def _config(source: Source, places: Sequence[Placed]) -> tuple[dict[str, Any], dict[str, Any]]:
    """``quantization_config``, and what else of config.json is no longer so: a head that has its own table now."""
    kv = None if source.kv is None else kv_args(source.kv, head_width(source))
    found = quantization_config(source, places, kv)
    if how_opened(source, places)[1]:
        found["dequantize"] = True  # transformers' word; from_pretrained then needs none from its caller
    untied = any(place.untied for place in places)
    changed: dict[str, Any] = {}
    if untied:
        changed["tie_word_embeddings"] = False
        text = source.config.get("text_config")
        if isinstance(text, Mapping):
            changed["text_config"] = {**text, "tie_word_embeddings": False}
    return found, changed


def _unequal(source: Source, schemes: Mapping[str, dict[str, Any]]) -> list[Refusal]:
    """Siblings that runtimes join, and that differ."""
    linear = [name for name in source.floats if name.endswith(".weight") and len(source.floats[name].shape) == 2]
    names = [*source.layers, *(name.removesuffix(".weight") for name in linear)]
    found = []
    for group in fused_groups(names):
        theirs = [schemes.get(name) for name in group]
        if any(scheme != theirs[0] for scheme in theirs):
            why = "runtimes join them into one layer"
            found.append(Refusal(layers=group, came="different schemes", nearest="one scheme for all of them", why=why))
    for group, divisor in nvfp4_groups(source, source.skeleton()):
        if divisor is None and group not in {refusal.layers for refusal in found}:
            why = "runtimes join them into one layer, which has one"
            came, nearest = "different global scales of NVFP4", "one global scale for all of them"
            found.append(Refusal(layers=group, came=came, nearest=nearest, why=why))
    return [*found, *unequal_inputs(source)]


def _inexact(source: Source, schemes: Mapping[str, dict[str, Any]]) -> list[Refusal]:
    """NVFP4 weights whose scales no divisor gives."""
    bad: list[str] = []
    for name, scheme in schemes.items():
        if (scheme.get("weights") or {}).get("strategy") != "tensor_group":
            continue
        layer = source.layers[name]
        bad += [prefix for prefix in layer.weights if divisor_of(source, layer, prefix) is None]
    why = "no divisor gives these values"
    return [Refusal(layers=tuple(bad), came="NVFP4 over a factor", nearest="nvfp4-ct", why=why)] if bad else []


def _narrowed(source: Source) -> list[str]:
    """Layers of integers whose scales lose bits in the dtype of the model."""
    found = []
    for name, layer in source.layers.items():
        for prefix, tensor in layer.weights.items():
            scale = tensor.params.scale if isinstance(tensor, BlockQTensor) else None
            plain = isinstance(scale, torch.Tensor) and tensor.format.is_integer  # type: ignore[attr-defined]
            if plain and layer.inputs is None and scale.dtype != source.dtype:  # type: ignore[union-attr]
                values = source.tensor(f"{prefix}.scale").float()
                if not torch.equal(values.to(source.dtype).float(), values):
                    found.append(name)
                    break
    return found


PART = CompressedTensors
