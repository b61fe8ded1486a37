"""A checkpoint as it is, and as its description says it should be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble.checkpoint.compressed import Compressed, compressed
from nybble.checkpoint.describe import check_version
from nybble.checkpoint.marked import MANIFEST, check_quantized, kept_beside, quantization_of
from nybble.core.errors import FileError, NybbleError
from nybble.core.guard import reading
from nybble.core.tensorheader import TensorEntry, TensorHeader, read_tensor_header
from nybble.models.build.config_file import read_json
from nybble.models.sources.folder import NAMED, weight_files
from nybble.models.sources.layouts import Files
from nybble.models.sources.layouts._ct_args import in_words
from nybble.models.sources.stored import DTYPES, read_tensor
from nybble.nn.kinds import Stored, kind_of_entry
from nybble.nn.kv_model import KVRecord, from_json
from nybble.nn.layouts import Layouts
from nybble.qtensor import QTensor

SAFETENSORS_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Checkpoint:
    """A model's tensors as they are, and as their description says they should be; whoever makes it compares them.

    Attributes:
        config: config.json, with nybble's ``quantization_config`` whatever the form of the files. stored: name -> entry
            of what nybble has under that name; of what is in the files in another form, what it will be.
        headers: the weight files' headers. modules: name -> description of a quantized module. layouts: what the
            descriptions number.
        expected: name -> (dtype, shape) of each quantized module's tensor.
        roles: name -> codes, scales, offsets, tables or unquantized. padding: bytes that packing wastes, by name.
        elements: name of a quantized weight -> its number of elements. formats: the same -> what it is, in words.
        owners: tensor -> the quantized weight that it is of, where its name doesn't begin with that one's. kv: what the
            model caches in, if it says so.
        compressed: where compressed-tensors' files have it all; None of files in nybble's own form. note: what of it
            won't be done.
    """

    config: dict[str, Any]
    stored: dict[str, TensorEntry]
    headers: tuple[TensorHeader, ...]
    modules: dict[str, dict[str, Any]]
    layouts: list[dict[str, Any]]
    expected: dict[str, tuple[str, list[int]]] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    padding: dict[str, int] = field(default_factory=dict)
    elements: dict[str, int] = field(default_factory=dict)
    formats: dict[str, str] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)
    kv: KVRecord | None = None
    compressed: Compressed | None = None
    note: str = ""


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read config.json, the weight files' headers and what nybble.json has to say; of tensors a few bytes.

    Raises:
        FileError: missing, malformed, not written by nybble, or these contradict each other; nothing else.
    """
    config = read_json(folder / "config.json")
    check_quantized(folder)
    beside = kept_beside(folder, config)
    quantization = quantization_of(config) or beside or {}
    files = weight_files(folder, config.get(NAMED))
    headers = tuple(read_tensor_header(file) for file in sorted({path for path, _ in files.values()}))
    stated = config.get("quantization_config") if beside is not None else None
    place = folder / ("config.json" if beside is None else MANIFEST)
    return checkpoint_of(place, config | {"quantization_config": quantization}, headers, stated)


def checkpoint_of(
    place: Path, config: dict[str, Any], headers: Sequence[TensorHeader], stated: Mapping[str, Any] | None = None
) -> Checkpoint:
    """The checkpoint that a description and files make.

    Args:
        place: of the description, for messages.
        config: config.json, with nybble's ``quantization_config``.
        headers: of the files.
        stated: ``quantization_config`` of files that are in compressed-tensors' form.

    Raises:
        FileError: malformed, or they contradict each other.
    """
    quantization = config["quantization_config"]
    check_version(quantization)
    stored = {name: entry for header in headers for name, entry in header.tensors.items()}
    kv = from_json(quantization.get("kv"))
    found = Checkpoint(config, stored, tuple(headers), quantization["modules"], quantization["layouts"], kv=kv)
    try:
        with reading(place):
            weights = _describe(found)
            if stated is not None:
                found = _compressed(found, weights, stated, place.parent)
    except FileError:
        raise
    except NybbleError as error:
        raise FileError(f"{place}: {error}") from error
    for name, (dtype, shape) in found.expected.items():
        entry = found.stored.get(name)
        if entry is None:
            raise FileError(f"{place.parent}: {place.name} describes {name}, which the weight files do not hold.")
        if (entry.dtype, list(entry.shape)) != (dtype, list(shape)):
            has = f"{entry.dtype} {list(entry.shape)}"
            raise FileError(f"{place.parent}: {name} should be {dtype} {list(shape)}; the file has {has}.")
    return found


def _describe(found: Checkpoint) -> list[QTensor]:
    """Fill in what the descriptions of the modules say is stored; returns the layouts, on the meta device."""
    layouts, said = Layouts(found.layouts), Stored()
    with torch.device("meta"):
        weights = [layouts.empty(number) for number in range(len(found.layouts))]
        for weight in weights:
            weight.dequantize()  # shapes that don't fit each other show here, not in the first forward
    for name, entry in found.modules.items():
        kind_of_entry(name, entry).stored(name, entry, weights, said)
    found.expected.update({name: (SAFETENSORS_NAMES[dtype], shape) for name, (dtype, shape) in said.tensors.items()})
    found.roles.update(said.roles)
    found.padding.update(said.padding)
    found.elements.update(said.elements)
    notes = {name: f", {note}" for name, note in said.notes.items()}
    found.formats.update({name: f"{in_words(weight)}{notes.get(name, '')}" for name, weight in said.weights.items()})
    return weights


def _compressed(found: Checkpoint, weights: list[QTensor], stated: Mapping[str, Any], folder: Path) -> Checkpoint:
    """The checkpoint with nybble's tensors in the places of those that they are made of."""
    files = Files(str(folder), found.stored, _Read(found.headers).read)
    made = compressed(stated, found.modules, weights, found.kv, files)
    stored = {name: entry for name, entry in found.stored.items() if name not in made.roles}
    for name, (dtype, shape) in found.expected.items():
        if name in made:
            stored[name] = TensorEntry(dtype=dtype, shape=tuple(shape), begin=0, nbytes=0)
    return replace(found, stored=stored, compressed=made)


class _Read:
    """Weight files, a tensor at a time."""

    def __init__(self, headers: Sequence[TensorHeader]) -> None:
        self._headers = {name: header for header in headers for name in header.tensors}

    def read(self, name: str) -> Tensor:
        """A tensor of the files, in memory of its own."""
        header = self._headers[name]
        return read_tensor(header.path, header.data_start, name, header.tensors[name])


class Tensors(_Read):
    """A checkpoint's tensors by nybble's names, read one at a time."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint.headers)
        self._compressed = checkpoint.compressed

    def get(self, name: str) -> Tensor:
        """A tensor of ``stored``, in memory of its own.

        Raises:
            FileError: the file can't be read, or holds what can't be meant.
        """
        if self._compressed is not None and name in self._compressed:
            return self._compressed.tensor(name, self.read).clone()
        return self.read(name)
