"""A quantized model as targets see it: layers with their descriptions, read one tensor at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from nybble.checkpoint.describe import restore_model
from nybble.checkpoint.load import check_complete, load_quantized
from nybble.checkpoint.marked import MANIFEST
from nybble.checkpoint.read import Checkpoint, Tensors, read_checkpoint
from nybble.core.errors import FileError
from nybble.core.tensorfile import Planned
from nybble.core.tensorheader import TensorEntry
from nybble.models.build.config_file import make_config, read_json
from nybble.models.build.skeleton import expected_tensors, fill_buffers_, kept_float32, meta_model
from nybble.models.sources.side_files import side_files
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.kinds import Kind, Stored, kind_of_entry
from nybble.nn.kv_model import KVRecord
from nybble.nn.layouts import Layouts
from nybble.nn.rotation import BlockRotation
from nybble.qtensor import QTensor, from_spec
from nybble.qtensor._by_rows import rows_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A quantized module.

    Attributes:
        name: of the module; of fused experts the module's and their parameter's. kind: what it is.
        weights: prefix of its tensors -> the matrix [out, in] on the meta device, in order; none where they are float.
        inputs, outputs: of what enters and leaves, parameters not filled. entry: its description in the file.
    """

    name: str
    kind: Kind
    weights: Mapping[str, QTensor]
    inputs: ActivationQuantizer | None
    outputs: ActivationQuantizer | None
    entry: Mapping[str, Any]


class Source(ABC):
    """A quantized model that is written elsewhere.

    Attributes:
        place: where it is. title: what people call the model.
        config: of config.json, without what describes the quantization.
        notes: what of the files is not in the rest, a line each.
        file_type: ``general.file_type`` as a GGUF file has it, unchecked; None of others, and where codes changed.
        layers: by name. kv: what it caches in. floats: name -> entry of what is stored and belongs to no quantizer.
    """

    place: str
    title: str
    config: dict[str, Any]
    layers: Mapping[str, Layer]
    kv: KVRecord | None
    floats: Mapping[str, TensorEntry]
    notes: Sequence[str] = ()
    file_type: int | None = None

    @abstractmethod
    def copied(self, name: str) -> Planned:
        """A stored tensor of any name, to be written as it is."""

    def filed(self, layer: Layer, prefix: str, form: str, role: str) -> Planned | None:
        """A part of a matrix as the files have it in another library's form; None where they have none such.

        Args:
            layer: with the matrix.
            prefix: which it is.
            form: as :class:`nybble.models.sources.layouts.PackedWeight` has it.
            role: of the part.
        """
        return None

    def blocks(self, layer: Layer, kind: str, turned: bool) -> tuple[Path, int, int] | None:
        """Where a layer's weight is in blocks of GGUF's type ``kind``: file, offset and size; None where it isn't.

        Args:
            layer: of one matrix.
            kind: as llama.cpp spells it.
            turned: whether rows are to be in the order in which llama.cpp rotates them.
        """
        return None

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """A stored tensor; what is let go of it leaves memory."""

    @abstractmethod
    def side_files(self) -> Mapping[str, Path]:
        """What stands beside the weights and goes along: name -> file."""

    def loaded(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model that nybble calculates with, in memory; what is in float in ``dtype``."""
        return model_of(self, dtype)

    def weight(self, layer: Layer, prefix: str) -> QTensor:
        """A layer's matrix, read."""
        empty = layer.weights[prefix]
        return from_spec(empty.spec(), {name: self.tensor(f"{prefix}.{name}") for name in empty.tensors()})

    def scales(self, layer: Layer, prefix: str) -> QTensor:
        """A layer's matrix with all that is read but its codes, which may be on the meta device."""
        empty = layer.weights[prefix]
        parts = empty.tensors()
        return from_spec(
            empty.spec(),
            {name: part if name == "codes" else self.tensor(f"{prefix}.{name}") for name, part in parts.items()},
        )

    def activation(self, layer: Layer, side: str) -> ActivationQuantizer | None:
        """The quantizer of ``inputs`` or ``outputs`` with its parameters, read."""
        found = getattr(layer, side)
        if found is None:
            return None
        filled = ActivationQuantizer.from_dict(dict(layer.entry[side]))
        filled.load_state_dict({name: self.tensor(f"{layer.name}.{side}.{name}") for name in filled.state_dict()})
        return filled

    def rotation(self, layer: Layer) -> BlockRotation | None:
        """What rotates a layer's input while the model runs, read; None where nothing does."""
        if layer.kind.unrotated is layer.kind:
            return None
        found = BlockRotation.from_dict(layer.entry["rotation"])
        found.load_state_dict({name: self.tensor(f"{layer.name}.rotation.{name}") for name in found.state_dict()})
        found.validate()
        return found

    @cached_property
    def known(self) -> dict[tuple[str, str], Any]:
        """What targets worked out about a layer, by what it is and the name; a source never changes."""
        return {}

    @cached_property
    def transformers_config(self) -> PreTrainedConfig:
        """The config that the float model has."""
        return make_config(dict(self.config), self.place)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of what is in float."""
        stated = self.transformers_config.dtype
        return stated if isinstance(stated, torch.dtype) else torch.float32

    def skeleton(self) -> PreTrainedModel:
        """The float model, on the meta device; always the same, nobody changes it."""
        return self._skeleton

    @cached_property
    def _skeleton(self) -> PreTrainedModel:
        return meta_model(self.transformers_config, self.dtype, [*self.floats, *self.layers])


def layers_of(modules: Mapping[str, Mapping[str, Any]], entries: list[dict[str, Any]]) -> dict[str, Layer]:
    """The layers that a checkpoint describes.

    Args:
        modules: name -> description.
        entries: the layouts that descriptions number.
    """
    layouts = Layouts(entries)
    with torch.device("meta"):
        empty = [layouts.empty(number) for number in range(len(layouts.entries))]
    found = {}
    for name, given in modules.items():
        entry, said = dict(given), Stored()
        kind = kind_of_entry(name, entry)
        kind.stored(name, entry, empty, said)
        numbers: Sequence[int] = entry.get("weights", [entry["weight"]] if "weight" in entry else [])
        weights = {prefix: empty[number] for prefix, number in zip(said.elements, numbers, strict=True)}
        sides = {s: ActivationQuantizer.from_dict(entry[s]) if s in entry else None for s in ("inputs", "outputs")}
        found[name] = Layer(name=name, kind=kind, weights=weights, entry=entry, **sides)
    return found


def described(source: Source) -> tuple[dict[str, dict[str, Any]], Layouts]:
    """How nybble's own files would describe a source: the inverse of :func:`layers_of`."""
    layouts = Layouts()
    modules: dict[str, dict[str, Any]] = {}
    for name, layer in source.layers.items():
        numbers = [layouts.number(weight) for weight in layer.weights.values()]
        modules[name] = dict(layer.entry)
        if "weights" in layer.entry:
            modules[name]["weights"] = numbers
        elif numbers:
            modules[name]["weight"] = numbers[0]
    return modules, layouts


def unrotated_rows(source: Source, layer: Layer, prefix: str) -> Iterator[Tensor]:
    """A layer's matrix, dequantized, some rows at a time: by the channels of an input that comes as it is."""
    rotation = source.rotation(layer)
    for rows in rows_of(source.weight(layer, prefix)):
        yield rows if rotation is None else rotation(rows, back=True)


def model_of(source: Source, dtype: torch.dtype) -> PreTrainedModel:
    """The model of any source in memory, in eval mode: packed weights packed, what is in float in ``dtype``."""
    modules, layouts = described(source)
    model = meta_model(source.transformers_config, dtype, [*source.floats, *source.layers])
    fill_buffers_(model)
    restore_model(model, modules, layouts.entries, source.kv)
    expected, kept = expected_tensors(model), kept_float32(model)
    tensors: dict[str, Tensor] = {}
    for name in source.floats:
        tensor = source.tensor(name).clone()
        wanted = torch.float32 if name in kept else dtype
        tensors[name] = tensor.to(wanted) if tensor.is_floating_point() else tensor
    for layer in source.layers.values():
        for prefix in layer.weights:
            held = source.weight(layer, prefix).tensors()
            tensors |= {f"{prefix}.{part}": tensor.clone() for part, tensor in held.items()}
        for side in ("inputs", "outputs"):
            if (filled := source.activation(layer, side)) is not None:
                tensors |= {f"{layer.name}.{side}.{part}": tensor for part, tensor in filled.state_dict().items()}
        if (rotation := source.rotation(layer)) is not None:
            tensors |= {f"{layer.name}.rotation.{part}": tensor for part, tensor in rotation.state_dict().items()}
    there = {id(expected[name]): tensor for name, tensor in tensors.items() if name in expected}
    tensors |= {name: there[id(t)] for name, t in expected.items() if id(t) in there and name not in tensors}
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    return nn.Module.eval(model)


class FolderSource(Source):
    """A folder that nybble wrote, open for reading; a context manager.

    Args:
        folder: of the model.
        checkpoint: what is in it, where that is known.

    Raises:
        FileError: it isn't one, or its files contradict each other.
    """

    def __init__(self, folder: Path, checkpoint: Checkpoint | None = None) -> None:
        self.folder, self.place, self.title = folder, str(folder), _title(folder)
        self._checkpoint: Checkpoint = read_checkpoint(folder) if checkpoint is None else checkpoint
        found = self._checkpoint
        self.config = {key: value for key, value in found.config.items() if key != "quantization_config"}
        self.kv = found.kv
        self._entries = {n: (h.path, h.data_start, e) for h in found.headers for n, e in h.tensors.items()}
        self.layers = layers_of(found.modules, found.layouts)
        self.floats = {name: entry for name, entry in found.stored.items() if name not in found.expected}
        self._tensors = Tensors(found)

    def check(self) -> None:
        """Whether the files are those of the model of config.json, all of them; no tensor is read.

        Raises:
            FileError: they are not.
        """
        check_complete(self.folder, self._checkpoint)

    def loaded(self, dtype: torch.dtype) -> PreTrainedModel:
        return load_quantized(self.folder, dtype)

    def copied(self, name: str) -> Planned:
        if name not in self._entries:  # made of others, as it is asked for
            entry = self._checkpoint.stored[name]
            return Planned(dtype=entry.dtype, shape=entry.shape, bytes_from=partial(self.tensor, name), raw=True)
        path, start, entry = self._entries[name]
        return Planned(dtype=entry.dtype, shape=entry.shape, bytes_from=path, offset=start + entry.begin)

    def tensor(self, name: str) -> Tensor:
        if name not in self._checkpoint.stored:
            raise FileError(f"{self.folder} has no tensor {name!r}.")
        return self._tensors.get(name)

    def side_files(self) -> Mapping[str, Path]:
        return side_files(self.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


def _title(folder: Path) -> str:
    """As the run that made it calls the model; else the folder's name."""
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    named = manifest.get("name")
    return named if isinstance(named, str) and named else folder.absolute().name
