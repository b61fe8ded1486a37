"""A folder without quantization: the dequantized weights, for any program that loads transformers' folders.

A weight is calculated in float32 and cast, as nybble's own layers do before each product. Rounded inputs and KV caches
are left out: a dense folder has no place for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from nybble.calibration.error import relative_error
from nybble.core.errors import ModelError
from nybble.core.files import atomic_write_json
from nybble.core.tensorfile import Planned, safetensors_name, stream_tensorfiles, whole
from nybble.export import Cast, ExportTarget, Facts, Refusal, Takes, Verified
from nybble.export._folder import SHARD_BYTES, write_beside
from nybble.export._names import as_stored
from nybble.export._source import Layer, Source, unrotated_rows
from nybble.export._transformers import open_and_compare
from nybble.models.build.skeleton import expected_tensors
from nybble.models.sources.layouts._ct_args import in_words
from nybble.nn.kinds import Kind, kind_of
from nybble.scheme import Scheme

_FEW = 1 << 16
"""Numbers whose squares are summed in float32."""

_DTYPES = {
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "float16": torch.float16, "f16": torch.float16,
    "float32": torch.float32, "f32": torch.float32,
}  # fmt: skip

_CARD = (
    "Its weights are plain numbers again, as they were after quantization: any program loads it, nybble is not needed."
)


class Dense(ExportTarget):
    """Plain safetensors; the option is their dtype, by default the model's."""

    summary = "plain safetensors of the dequantized weights"
    in_float = True
    rotates = True  # folded into the weights
    drops_rounding = True
    loses = "codes and scales: weights are as large as they were; the rounding of inputs, outputs and the KV cache"
    options: ClassVar = {name: f"in {str(dtype).removeprefix('torch.')}" for name, dtype in _DTYPES.items()}
    takes = (
        Takes(
            weights="any",
            inputs="float",
            form="safetensors",
            runtime="transformers",
            since="",
            source="https://huggingface.co/docs/transformers/main_classes/model",
            note="a version that has the model's family; opened with 5.23",
        ),
    )

    def constrain(self, scheme: Scheme, facts: Facts) -> Scheme:
        """Any scheme fits."""
        return scheme

    def check(self, source: Source) -> list[Refusal]:
        """Nothing is refused."""
        return []

    def notes(self, source: Source) -> list[str]:  # noqa: D102
        lines = []
        rounded = [layer.name for layer in source.layers.values() if layer.inputs or layer.outputs]
        rounded += [layer.name for layer in source.layers.values() if layer.kind.operands]
        if rounded:
            more = f" and {len(rounded) - 1} more" if len(rounded) > 1 else ""
            lines.append(f"activations are not rounded any more: {rounded[0]}{more}")
        if source.kv is not None:
            lines.append("the KV cache is in float")
        return lines

    def casts(self, source: Source) -> list[Cast]:  # noqa: D102
        dtype, found = _DTYPES.get(self.option, source.dtype), []
        to = str(dtype).removeprefix("torch.")
        if self.option:
            names = {str(safetensors_name(one)): str(one).removeprefix("torch.") for one in _DTYPES.values()}
            floats = ((name, names.get(entry.dtype, to)) for name, entry in source.floats.items())
            found = [
                Cast(name=name.removesuffix(".weight"), came=came, to=to)
                for name, came in floats
                if to not in (came, "float32")
            ]
        if to == "float32":
            return found
        weights = ((layer.name, next(iter(layer.weights.values()), None)) for layer in source.layers.values())
        return [*found, *(Cast(name=name, came=in_words(w), to=to) for name, w in weights if w is not None)]

    def write(self, source: Source, folder: Path) -> None:  # noqa: D102
        dtype = _DTYPES.get(self.option, source.dtype)
        model = source.skeleton()
        tensors = _tensors(source, model, dtype if self.option else None, self.errors)
        read = partial(_read, source, tensors)
        stored = as_stored(model, tensors, read)
        stream_tensorfiles(stored, folder / "model.safetensors", {"format": "pt"}, SHARD_BYTES)
        config = source.config | {"dtype": str(dtype).removeprefix("torch.")}
        atomic_write_json(folder / "config.json", config)
        write_beside(source, folder, _CARD)

    def verify(self, folder: Path, source: Source) -> Verified:
        """The weights are compared in the dtype of the files."""
        dtype = _DTYPES.get(self.option, source.dtype)
        return open_and_compare(folder, source, ("transformers",), self.takes, dtype, unrotated=True)


def _read(source: Source, tensors: dict[str, Planned], name: str) -> Tensor:
    made = tensors[name].bytes_from
    return source.tensor(name) if isinstance(made, Path) else whole(made())


def _tensors(source: Source, model: Any, dtype: torch.dtype | None, errors: dict[str, float]) -> dict[str, Planned]:
    """Everything that the float model has, by name in it.

    Args:
        source: what is written.
        model: its float skeleton.
        dtype: that all is to have; None leaves float tensors theirs, and gives weights what the model has there.
        errors: gets those of what is cast, when it is.
    """
    expected = expected_tensors(model)
    found: dict[str, Planned] = {}
    for name, entry in source.floats.items():
        if dtype is None or entry.dtype not in ("F64", "F32", "F16", "BF16") or entry.dtype == safetensors_name(dtype):
            found[name] = source.copied(name)
        else:
            cast = partial(_cast, source, name, dtype, errors)
            found[name] = Planned(dtype=str(safetensors_name(dtype)), shape=entry.shape, bytes_from=cast)
    for layer in source.layers.values():
        for name in _parameters(model, layer):
            wanted = dtype or expected[name].dtype
            make = partial(_values, source, layer, model, name, wanted, errors)
            shape = tuple(expected[name].shape)
            found[name] = Planned(dtype=str(safetensors_name(wanted)), shape=shape, bytes_from=make)
    found |= _norms(source, model, found)
    ours = {name for name in found if name in expected}
    unknown = sorted(found.keys() - ours)
    if unknown:
        raise ModelError(f"{source.place} holds {unknown[0]}, which a float {type(model).__name__} does not have.")
    return found


def _cast(source: Source, name: str, dtype: torch.dtype, errors: dict[str, float]) -> Tensor:
    found = source.tensor(name)
    made = found.to(dtype)
    errors[name.removesuffix(".weight")] = relative_error(
        found.float().reshape(1, -1), made.float().reshape(1, -1), None
    )
    return made


def _at(model: Any, layer: Layer) -> tuple[str, str, Any, Kind]:
    """Name of the module that has a layer's matrices, their parameter there, the module, its kind."""
    at, _, leaf = layer.name.rpartition(".") if layer.kind.fused else (layer.name, "", "")
    module = model.get_submodule(at)
    kind = kind_of(module)
    if kind is None:
        raise ModelError(f"{layer.name} is a {type(module).__name__} in the float model, which holds no matrix.")
    return at, leaf, module, kind


def _parameters(model: Any, layer: Layer) -> list[str]:
    """Full names of the parameters that hold a layer's matrices."""
    if not layer.weights:
        return []
    at, leaf, _, kind = _at(model, layer)
    return [f"{at}.{name}" for name in kind.parameters(leaf)]


def _values(
    source: Source, layer: Layer, model: Any, name: str, dtype: torch.dtype, errors: dict[str, float]
) -> Tensor | Iterator[Tensor]:
    """A parameter's values; in pieces where the matrix is the parameter, so that none is in memory in float."""
    at, leaf, module, kind = _at(model, layer)
    given = (_pieces(source, layer, prefix, dtype, errors) for prefix in layer.weights)
    if not kind.fused:
        (pieces,) = given
        empty = torch.empty(next(iter(layer.weights.values())).shape, device="meta")
        if kind.values(module, leaf, empty)[name.removeprefix(f"{at}.")] is empty:
            return pieces
        matrix = whole(pieces)
    else:
        matrix = torch.stack([whole(pieces) for pieces in given])
    return kind.values(module, leaf, matrix)[name.removeprefix(f"{at}.")].contiguous()


def _pieces(
    source: Source, layer: Layer, prefix: str, dtype: torch.dtype, errors: dict[str, float]
) -> Iterator[Tensor]:
    """A matrix in ``dtype``, some rows at a time; once all are there, ``errors`` has what casting has cost."""
    lost = power = 0.0
    for wide in unrotated_rows(source, layer, prefix):
        made = wide.to(dtype)
        if dtype != torch.float32:
            lost += _power(wide - made)  # in float32
            power += _power(wide)
        yield made
    if dtype != torch.float32:
        error = 0.0 if power <= 0 else lost / power  # in this order: NaN stays
        errors[layer.name] = max(error, errors.get(layer.name, 0.0))


def _power(values: Tensor) -> float:
    """The sum of squares: in float64 over float32 sums of few."""
    flat = values.reshape(-1)
    parts = (flat,) if flat.numel() <= _FEW else torch.split(flat, _FEW)
    return sum((float(few.dot(few)) for few in parts), 0.0)


def _norms(source: Source, model: Any, found: dict[str, Planned]) -> dict[str, Planned]:
    """Of BatchNorms that are in the convolutions before them: one that only adds the bias that it has become."""
    norms: dict[str, Planned] = {}
    for layer in source.layers.values():
        folded = str(layer.entry.get("folded", ""))
        if not folded:
            continue
        norm = model.get_submodule(folded)
        has_bias = model.get_submodule(layer.name).bias is not None
        bias = found[f"{layer.name}.bias"]
        if not has_bias:
            del found[f"{layer.name}.bias"]
        width, zero = norm.num_features, torch.zeros(norm.num_features)
        values = {
            "weight": torch.ones(width), "running_mean": zero, "running_var": torch.full((width,), 1 - norm.eps),
            **({"bias": zero} if has_bias else {}),
        }  # fmt: skip
        for name, value in values.items():
            norms[f"{folded}.{name}"] = Planned(dtype="F32", shape=(width,), bytes_from=partial(_same, value))
        if not has_bias:
            norms[f"{folded}.bias"] = bias
        count = torch.zeros((), dtype=torch.int64)
        norms[f"{folded}.num_batches_tracked"] = Planned(dtype="I64", shape=(), bytes_from=partial(_same, count))
    return norms


def _same(tensor: Tensor) -> Tensor:
    return tensor


PART = Dense
