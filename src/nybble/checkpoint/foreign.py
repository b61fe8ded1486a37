"""What the files of models that nybble didn't write keep, in the words of those that it did; headers alone are read."""

from __future__ import annotations

import math

from nybble.checkpoint.read import SAFETENSORS_NAMES, Checkpoint
from nybble.core.errors import FileError, ModelError
from nybble.core.tensorheader import TensorEntry, TensorHeader, read_tensor_header
from nybble.models.build.config_file import read_json
from nybble.models.gguf.types import by_number, type_name
from nybble.models.sources import ModelSource
from nybble.models.sources.folder import FolderSource
from nybble.models.sources.gguf_file import GgufSource
from nybble.models.sources.gguf_rope import FACTORS
from nybble.models.sources.layouts._ct_args import in_words
from nybble.nn.kinds import Stored


def of_folder(source: ModelSource) -> Checkpoint:
    """Of another library's folder, or a float one.

    Raises:
        FileError: it can't be read. ModelError: a source of another kind.
    """
    if not isinstance(source, FolderSource):
        raise ModelError(f"{source.spec} is no folder and no file whose bytes could be told apart.")
    paths = sorted({path for path in source.weight_files() if path.suffix == ".safetensors"})
    headers = tuple(read_tensor_header(path) for path in paths)
    stored = {name: entry for header in headers for name, entry in header.tensors.items()}
    config = read_json(source.folder / "config.json")
    found = Checkpoint(config, stored, headers, {}, [], note=source.rounded.left)
    found.roles.update(dict.fromkeys(source.rounded.used, "scales"))
    found.roles.update(dict.fromkeys(source.rounded.matrices, "tables"))
    for name, weight in source.packed.items():
        found.elements[name] = math.prod(weight.shape)
        turned = "" if weight.rotation is None else f", behind a rotation of {weight.rotation.block} channels"
        found.formats[name] = f"{in_words(source.described_stored(name)[0])}{turned}"
        for role, part in weight.parts.items():
            found.roles[part], found.owners[part] = weight.kept_as[role], name
    return found


def of_gguf(source: GgufSource) -> Checkpoint:
    """Of a GGUF file, whose blocks hold codes, scales and offsets side by side.

    Raises:
        FileError: it can't be read, or doesn't fit its config.
    """
    entries = source.entries()
    begin = min((entry.start for entry in entries.values()), default=source.path.stat().st_size)
    stored: dict[str, TensorEntry] = {}
    header = TensorHeader(path=source.path, tensors=stored, metadata={}, data_start=begin)
    found = Checkpoint({}, stored, (header,), {}, [])
    packed = {source.file_name(name): name for name in source.packed_names()}
    for file, entry in entries.items():
        if file in packed:
            _take_apart(found, source, packed[file], file)
        else:
            stored[file] = TensorEntry(dtype="", shape=entry.shape, begin=0, nbytes=entry.nbytes)
            if file in FACTORS:  # of the rope: no parameters of the model
                found.roles[file] = "tables"
    between = source.path.stat().st_size - begin - sum(entry.nbytes for entry in stored.values())
    _pad(found, "", between)  # tensors begin at multiples of 32 bytes
    return found


def _take_apart(found: Checkpoint, source: GgufSource, name: str, file: str) -> None:
    """Count the parts of a tensor's blocks; what none of them needs is padding."""
    entry, said = source.entries()[file], Stored()
    kind, rest = by_number()[entry.kind], entry.nbytes
    (weight,) = source.described_packed(name)
    said.weight(file, weight)
    for part, (dtype, shape) in said.tensors.items():
        if kind.scaled_apart and part == f"{file}.scale.scale":
            continue  # a tensor of its own, or none
        nbytes = math.prod(shape) * dtype.itemsize
        found.stored[part] = TensorEntry(dtype=SAFETENSORS_NAMES[dtype], shape=tuple(shape), begin=0, nbytes=nbytes)
        found.roles[part], found.owners[part] = said.roles[part], file
        rest -= nbytes
    _pad(found, f"{file}.padding", rest)
    found.owners[f"{file}.padding"] = file
    found.elements[file], found.formats[file] = math.prod(entry.shape), type_name(kind)
    if scale := source.scale_name(name):
        found.roles[scale], found.owners[scale] = "scales", file


def _pad(found: Checkpoint, name: str, nbytes: int) -> None:
    if not nbytes:
        return
    if nbytes < 0:
        raise FileError(f"{found.headers[0].path}: {name or 'tensors'} overlap, or have fewer bytes than their types.")
    found.stored[name] = TensorEntry(dtype="", shape=(nbytes,), begin=0, nbytes=nbytes)
    found.roles[name] = "padding"
