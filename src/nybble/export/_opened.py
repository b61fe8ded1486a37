"""Another library's quantized model, or a GGUF file, as targets see it: streamed, every code as it came.

What the files call their weights, and how they pack them, is :mod:`nybble.models.sources`' to know. Here each packed
weight gets the place that nybble's own files would give it, so a target can't tell the two apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nybble.checkpoint.describe import describe_model
from nybble.checkpoint.save import model_config
from nybble.core.dtypes import FLOATS, float_dtype
from nybble.core.errors import FileError, ModelError, SchemeError
from nybble.core.files import disk_errors
from nybble.core.tensorfile import Planned, safetensors_name
from nybble.core.tensorheader import TensorEntry
from nybble.export._source import Layer, Source, layers_of
from nybble.models.build.config_file import read_json
from nybble.models.build.packed import cache_of, fits, lost_sides, rotated, shared_by, sides_of
from nybble.models.build.skeleton import twin_of
from nybble.models.sources import ModelSource
from nybble.models.sources.folder import FolderSource
from nybble.models.sources.gguf_file import GgufSource
from nybble.models.sources.side_files import GENERATION, side_files
from nybble.models.sources.stored import DTYPES
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.kinds import Quantized, targets_of
from nybble.nn.rotation import BlockRotation
from nybble.qtensor import QTensor
from nybble.qtensor.block import BlockQTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Packed = Mapping[str, Sequence[QTensor]]
"""Parameter -> its matrices on the meta device."""
_KEPT = 2
"""Layers that stay in memory: files have the names of an expert's three matrices, of two parameters, side by side."""


class OpenedSource(Source):
    """A model of any source, its packed weights as QTensors.

    Args:
        source: where it is. room: an empty folder, for files that a GGUF has in another form.

    Attributes:
        unpacked: parameters that the files pack and no layer can hold: they are here in float.
        notes: what of the files is not in the layers, a line each.

    Raises:
        ModelError: tensors that don't fit the model. FileError: files that contradict each other.
    """

    def __init__(self, source: ModelSource, room: Path) -> None:
        self._source, self._room = source, room
        self.place = source.spec
        self.title = source.spec.rstrip("/").rsplit("/")[-1].removeprefix("demo:").removesuffix(".gguf")
        self.file_type = source.file_type if isinstance(source, GgufSource) else None
        packed: Packed = {name: source.described_packed(name) for name in source.packed_names()}
        self._outline = source.outline(_dtype(source, packed))
        model = twin_of(self._outline)
        self.config = model_config(model, model.dtype)
        self.kv = cache_of(source, model)
        self._sides: dict[str, dict[str, ActivationQuantizer]] = {}
        self._parameters = _place(source, model, packed, self._sides)
        described = describe_model(model)
        self.layers = layers_of(described["modules"], described["layouts"])
        self._names = {prefix: layer.name for layer in self.layers.values() for prefix in layer.weights}
        placed = set(self._parameters.values())
        self.unpacked = sorted(packed.keys() - placed)
        self.notes: list[str] = self._notes()
        self._beside = self._side_files()
        self.floats = {name: self._float(name) for name in source.stored() if name not in placed}
        self.notes += self._wide()
        self._made: dict[str, Sequence[QTensor]] = {}

    def _wide(self) -> list[str]:
        """What of a GGUF stays in float32 in a model of 16 bits, which would round it."""
        if not isinstance(self._source, GgufSource) or self.dtype == torch.float32:
            return []
        wide = [n for n, entry in self.floats.items() if entry.dtype == "F32" and n not in self.unpacked]
        more = f" and {len(wide) - 1} more" if len(wide) > 1 else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return [f"in float32, as {dtype} would round it: {wide[0]}{more}"] if wide else []

    def _notes(self) -> list[str]:
        found = [self._source.note] if self._source.note else []
        if isinstance(self._source, FolderSource):
            lost = lost_sides(self._source, sum(map(len, self._sides.values())))
            found = [*self._source.notes(in_float=False), *([lost] if lost else [])]
            used = {part for weight in self._source.packed_names().values() for part in weight.parts.values()}
            joined = sorted(n for n, w in self._source.packed.items() if not used.issuperset(w.parts.values()))
            if joined:
                found.append(
                    f"{len(joined)} packed weights that transformers joins with others in float are in float here, "
                    f"{joined[0]} first"
                )
        if self.unpacked:
            more = f" and {len(self.unpacked) - 1} more" if len(self.unpacked) > 1 else ""
            found.append(f"packed in the files, and in float here, as no layer can hold it: {self.unpacked[0]}{more}")
        return found

    def _float(self, name: str) -> TensorEntry:
        found = self._source.stored()[name]
        dtype = found.dtype
        if isinstance(self._source, GgufSource) and name not in self.unpacked:
            dtype = self._source.kept_dtype(name)
            if dtype == torch.float32 and self.dtype != dtype:  # as GGUF has norms and biases whatever they were
                ((_, values),) = self._source.read([name])
                exact = torch.equal(values.to(self.dtype).float(), values)
                dtype = self.dtype if exact else dtype
        nbytes = found.numel * dtype.itemsize
        return TensorEntry(dtype=str(safetensors_name(dtype)), shape=tuple(found.shape), begin=0, nbytes=nbytes)

    def skeleton(self) -> PreTrainedModel:
        return self._outline

    def copied(self, name: str) -> Planned:
        if name in self.floats:
            entry = self.floats[name]
            at = self._source.stored_at(name) if isinstance(self._source, FolderSource) else None
            if at is not None:
                return Planned(dtype=entry.dtype, shape=entry.shape, bytes_from=at[0], offset=at[1])
            return Planned(dtype=entry.dtype, shape=entry.shape, bytes_from=partial(self.tensor, name), raw=True)
        passing = self._passing(name)
        empty = self._described_part(name) if passing is None else passing
        dtype, shape = str(safetensors_name(empty.dtype)), tuple(empty.shape)
        kept = self._kept(name) if passing is None else None
        if kept is not None:
            return Planned(dtype=dtype, shape=shape, bytes_from=kept[0], offset=kept[1])
        return Planned(dtype=dtype, shape=shape, bytes_from=partial(self.tensor, name), raw=True)

    def filed(self, layer: Layer, prefix: str, form: str, role: str) -> Planned | None:
        if not isinstance(self._source, FolderSource) or len(layer.weights) != 1:
            return None
        found = self._source.filed_at(self._parameters[layer.name], form, role)
        if found is None:
            return None
        path, begin, entry = found
        return Planned(dtype=entry.dtype, shape=tuple(entry.shape), bytes_from=path, offset=begin)

    def blocks(self, layer: Layer, kind: str, turned: bool) -> tuple[Path, int, int] | None:
        if not isinstance(self._source, GgufSource):
            return None
        return self._source.blocks_at(self._parameters[layer.name], kind, turned)

    def tensor(self, name: str) -> Tensor:
        if name in self.floats:
            found = self._float_tensor(name)
            wanted = self.floats[name].dtype
            return found if safetensors_name(found.dtype) == wanted else found.to(DTYPES[wanted])
        passing = self._passing(name)
        if passing is not None:
            return passing
        kept = self._kept(name)
        if kept is not None:
            path, begin, entry = kept
            assert isinstance(self._source, FolderSource)
            stored, empty = self._source.read_at(path, begin, name, entry), self._described_part(name)
            return stored.reshape(-1).view(empty.dtype).reshape(empty.shape)
        prefix, part = self._split(name)
        return self.weight(self.layers[self._names[prefix]], prefix).tensors()[part]

    def _float_tensor(self, name: str) -> Tensor:
        at = self._source.stored_at(name) if isinstance(self._source, FolderSource) else None
        if at is not None and at[2].dtype in DTYPES:
            assert isinstance(self._source, FolderSource)
            return self._source.read_at(at[0], at[1], name, at[2])
        ((_, found),) = self._source.read([name])
        return found

    def _kept(self, name: str) -> tuple[Path, int, TensorEntry] | None:
        """Where a weight's tensor stands in the files as it is, and no other number of the weight has to be read."""
        if not isinstance(self._source, FolderSource):
            return None
        prefix, part = self._split(name)
        layer = self.layers[self._names[prefix]]
        if not isinstance(layer.weights[prefix], BlockQTensor):  # others' tensors are checked against each other
            return None
        return self._source.packed_at(self._parameters[layer.name], list(layer.weights).index(prefix), part)

    def activation(self, layer: Layer, side: str) -> ActivationQuantizer | None:
        return self._sides.get(layer.name, {}).get(side)

    def rotation(self, layer: Layer) -> BlockRotation | None:
        if layer.kind.unrotated is layer.kind or not isinstance(self._source, FolderSource):
            return None
        return self._source.rotation(self._parameters[layer.name])

    def _passing(self, name: str) -> Tensor | None:
        """A number of what rounds inputs or outputs, or rotates inputs, if it is one."""
        module, _, part = name.rpartition(".")
        owner, _, side = module.rpartition(".")
        if side == "rotation" and owner in self.layers:
            made = self.rotation(self.layers[owner])
            return None if made is None else made.state_dict().get(part)
        quantizer = self._sides.get(owner, {}).get(side)
        found: Tensor | None = None if quantizer is None else quantizer.state_dict().get(part)
        return found

    def weight(self, layer: Layer, prefix: str) -> QTensor:
        if layer.name not in self._made:
            while len(self._made) >= _KEPT:
                del self._made[next(iter(self._made))]
            found = self._read(layer.name)
            for part, wanted in zip(found, layer.weights.values(), strict=True):
                part.validate()
                if part.spec() != wanted.spec():
                    raise FileError(f"{self.place}: {prefix} is not what its description says.")
            self._made[layer.name] = found
        return self._made[layer.name][list(layer.weights).index(prefix)]

    def scales(self, layer: Layer, prefix: str) -> QTensor:
        names = [f"{prefix}.{name}" for name in layer.weights[prefix].tensors() if name != "codes"]
        if all(self._kept(name) is not None for name in names):
            return super().scales(layer, prefix)
        return self.weight(layer, prefix)

    def _read(self, layer: str) -> Sequence[QTensor]:
        return self._source.read_packed(self._parameters[layer])

    def _split(self, name: str) -> tuple[str, str]:
        """Prefix of a stored weight, and which of its tensors is meant."""
        for at in reversed([i for i, letter in enumerate(name) if letter == "."]):
            if name[:at] in self._names:
                return name[:at], name[at + 1 :]
        raise FileError(f"{self.place} has no tensor {name!r}.")

    def _described_part(self, name: str) -> Tensor:
        prefix, part = self._split(name)
        return self.layers[self._names[prefix]].weights[prefix].tensors()[part]

    def _side_files(self) -> dict[str, Path]:
        found = dict(self._source.side_files())
        if found or isinstance(self._source, FolderSource):
            return found
        lacks = self._source.write_side_files(self._room)
        if lacks:
            self.notes.append(lacks)
        generation = getattr(self._source.skeleton(torch.float32), "generation_config", None)
        if generation is not None:
            with disk_errors(self._room / GENERATION):
                generation.to_json_file(self._room / GENERATION, keys_to_pop=["compile_config"])
        return side_files(self._room)

    def side_files(self) -> Mapping[str, Path]:
        """As the folder has them; of a GGUF its tokenizer in transformers' form, written once."""
        return self._beside


def _dtype(source: ModelSource, packed: Packed) -> torch.dtype:
    """What the model is in: as its config says; of a GGUF, which says nothing, what its scales and floats are in.

    Runtimes keep the scales of integers in the model's dtype, so of float16 scales another one would round them.
    """
    if isinstance(source, GgufSource):
        return _gguf_dtype(source, packed)
    raw = read_json(source.folder / "config.json") if isinstance(source, FolderSource) else {}
    stated = raw.get("dtype", raw.get("torch_dtype"))
    return float_dtype(stated, "dtype") if stated in FLOATS else torch.bfloat16


def _gguf_dtype(source: GgufSource, packed: Packed) -> torch.dtype:
    halves = any(t.dtype == torch.float16 for q in packed.values() for part in q for t in part.tensors().values())
    floats = Counter[torch.dtype]()
    for name, found in source.stored().items():
        if name not in packed and len(found.shape) == 2:  # others are in float32 in every file
            floats[source.kept_dtype(name)] += found.numel
    if packed:
        del floats[torch.float32]  # routers of experts
    if torch.bfloat16 in floats:
        return torch.bfloat16
    return torch.float16 if halves else max(floats, key=lambda dtype: floats[dtype], default=torch.bfloat16)


def _place(
    source: ModelSource, model: PreTrainedModel, packed: Packed, passing: dict[str, dict[str, ActivationQuantizer]]
) -> dict[str, str]:
    """Put packed weights, on the meta device, where the float ones of a model stand: layer -> its parameter.

    One that is tied to more than an embedding and its head has no place.

    Args:
        source: what there is.
        model: a skeleton.
        packed: descriptions of its packed weights.
        passing: gets what rounds inputs and outputs, by layer and side.
    """
    placed: dict[str, str] = {}
    for target in targets_of(model).values():
        names = [name for name in target.parameters if name in packed]
        if len(names) != 1 or names != list(target.parameters):
            continue
        (name,), found = names, packed[names[0]]
        planned = shared_by(target, model, name, source.ties()) if fits(target, found) else None
        if planned is None:
            continue
        sides = sides_of(source, target, name)
        made = Quantized(weights=found, inputs=sides.get("inputs"), outputs=sides.get("outputs"))
        try:
            planned = rotated(source, planned, model, name)
            planned.kind.put(model, planned, made)
        except (SchemeError, ModelError):
            continue
        placed[target.name] = name
        passing |= {target.name: sides} if sides else {}
    return placed
