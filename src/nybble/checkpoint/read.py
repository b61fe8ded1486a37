"""A checkpoint as it is, and as its config.json says it should be."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nybble.checkpoint.describe import check_version
from nybble.checkpoint.marked import check_quantized, quantization_of
from nybble.core.errors import FileError, NybbleError
from nybble.core.guard import reading
from nybble.core.tensorheader import TensorEntry, TensorHeader, read_tensor_header
from nybble.models.build.config_file import read_json
from nybble.models.sources.folder import DTYPES, NAMED, weight_files
from nybble.nn.kinds import Stored, kind_of_entry
from nybble.nn.kv_model import KVRecord, from_json
from nybble.nn.layouts import Layouts

SAFETENSORS_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Checkpoint:
    """A folder's tensors as they are, and as config.json says they should be; :func:`read_checkpoint` compares them.

    Attributes:
        config: config.json. stored: name -> entry of a safetensors header. headers: the weight files' headers.
        modules: name -> description of a quantized module. layouts: what the descriptions number.
        expected: name -> (dtype, shape) of each quantized module's tensor.
        roles: name -> codes, scales, offsets, tables or unquantized. padding: bytes that packing wastes, by name.
        elements: name of a quantized weight -> its number of elements. owners: tensor -> the quantized weight that it
            is of, where its name doesn't begin with that one's. kv: what the model caches in, if it says so.
        note: what of it won't be done.
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
    owners: dict[str, str] = field(default_factory=dict)
    kv: KVRecord | None = None
    note: str = ""


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read config.json and the weight files' headers; no tensor is read.

    Raises:
        FileError: missing, malformed, not written by nybble, or config and files contradict each other; nothing else.
    """
    config = read_json(folder / "config.json")
    check_quantized(folder)
    quantization = quantization_of(config) or {}
    check_version(quantization)
    files = weight_files(folder, config.get(NAMED))
    headers = tuple(read_tensor_header(file) for file in sorted({path for path, _ in files.values()}))
    stored = {name: entry for header in headers for name, entry in header.tensors.items()}
    kv = from_json(quantization.get("kv"))
    found = Checkpoint(config, stored, headers, quantization["modules"], quantization["layouts"], kv=kv)
    try:
        with reading(folder / "config.json"):
            _describe(found)
    except FileError:
        raise
    except NybbleError as error:
        raise FileError(f"{folder / 'config.json'}: {error}") from error
    for name, (dtype, shape) in found.expected.items():
        entry = stored.get(name)
        if entry is None:
            raise FileError(f"{folder}: config.json describes {name}, which the weight files do not hold.")
        if (entry.dtype, list(entry.shape)) != (dtype, list(shape)):
            has = f"{entry.dtype} {list(entry.shape)}"
            raise FileError(f"{folder}: {name} should be {dtype} {list(shape)}; the file has {has}.")
    return found


def _describe(found: Checkpoint) -> None:
    """Fill in what the descriptions of the modules say is stored."""
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
