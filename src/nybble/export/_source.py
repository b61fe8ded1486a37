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
from torch import Tensor

from nybble.checkpoint.read import Checkpoint, Tensors, read_checkpoint
from nybble.core.errors import FileError
from nybble.core.tensorfile import Planned
from nybble.core.tensorheader import TensorEntry
from nybble.models.build.config_file import make_config
from nybble.models.build.skeleton import meta_model
from nybble.models.sources.side_files import side_files
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.kinds import Kind, Stored, kind_of_entry
from nybble.nn.kv_model import KVRecord
from nybble.nn.layouts import Layouts
from nybble.qtensor import QTensor, from_spec

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
        place: what it is called. config: of config.json, without what describes the quantization.
        layers: by name. kv: what it caches in. floats: name -> entry of what is stored and belongs to no quantizer.
    """

    place: str
    config: dict[str, Any]
    layers: Mapping[str, Layer]
    kv: KVRecord | None
    floats: Mapping[str, TensorEntry]

    @abstractmethod
    def copied(self, name: str) -> Planned:
        """A stored tensor of any name, to be written as it is."""

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """A stored tensor; it may be a view of the file."""

    @abstractmethod
    def side_files(self) -> Mapping[str, Path]:
        """What stands beside the weights and goes along: name -> file."""

    def weight(self, layer: Layer, prefix: str) -> QTensor:
        """A layer's matrix, read."""
        empty = layer.weights[prefix]
        return from_spec(empty.spec(), {name: self.tensor(f"{prefix}.{name}") for name in empty.tensors()})

    def activation(self, layer: Layer, side: str) -> ActivationQuantizer | None:
        """The quantizer of ``inputs`` or ``outputs`` with its parameters, read."""
        found = getattr(layer, side)
        if found is None:
            return None
        filled = ActivationQuantizer.from_dict(dict(layer.entry[side]))
        filled.load_state_dict({name: self.tensor(f"{layer.name}.{side}.{name}") for name in filled.state_dict()})
        return filled

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


class FolderSource(Source):
    """A folder that nybble wrote, open for reading; a context manager.

    Args:
        folder: of the model.
        checkpoint: what is in it, where that is known.

    Raises:
        FileError: it isn't one, or its files contradict each other.
    """

    def __init__(self, folder: Path, checkpoint: Checkpoint | None = None) -> None:
        self.folder, self.place = folder, str(folder)
        self._checkpoint: Checkpoint = read_checkpoint(folder) if checkpoint is None else checkpoint
        found = self._checkpoint
        self.config = {key: value for key, value in found.config.items() if key != "quantization_config"}
        self.kv = found.kv
        self._entries = {n: (h.path, h.data_start, e) for h in found.headers for n, e in h.tensors.items()}
        self.layers = dict(self._described())
        self.floats = {name: entry for name, entry in found.stored.items() if name not in found.expected}
        self._tensors = Tensors(found)

    def _described(self) -> Iterator[tuple[str, Layer]]:
        layouts = Layouts(self._checkpoint.layouts)
        with torch.device("meta"):
            empty = [layouts.empty(number) for number in range(len(layouts.entries))]
        for name, entry in self._checkpoint.modules.items():
            kind = kind_of_entry(name, entry)
            said = Stored()
            kind.stored(name, entry, empty, said)
            numbers: Sequence[int] = entry.get("weights", [entry["weight"]] if "weight" in entry else [])
            weights = {prefix: empty[number] for prefix, number in zip(said.elements, numbers, strict=True)}
            sides = {s: ActivationQuantizer.from_dict(entry[s]) if s in entry else None for s in ("inputs", "outputs")}
            yield name, Layer(name=name, kind=kind, weights=weights, entry=entry, **sides)

    def copied(self, name: str) -> Planned:
        if name not in self._entries:  # made of others, as it is asked for
            entry = self._checkpoint.stored[name]
            return Planned(dtype=entry.dtype, shape=entry.shape, bytes_from=partial(self.tensor, name))
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
        self._tensors.__exit__(kind, error, trace)
