"""What every byte of a quantized model is for; the sum is the size on disk, and there is no "other"."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from nybble.checkpoint.card import CARD
from nybble.checkpoint.marked import is_others
from nybble.checkpoint.read import Checkpoint, read_checkpoint
from nybble.core.errors import FileError
from nybble.core.tensorheader import read_tensor_header
from nybble.models.build.config_file import read_json
from nybble.models.sources.folder import FolderSource
from nybble.models.sources.side_files import is_tokenizer_file


def inspect(folder: str | Path) -> dict[str, Any]:
    """Bytes by role, by module and by file, of a folder that nybble wrote or of another library's quantized model.

    Returns:
        ``bytes``: role -> bytes (codes, scales, offsets, tables, padding, unquantized, headers, config, tokenizer ...),
        which add up to ``total``, the size of all files; ``modules``: per quantized weight bytes by role, elements,
        bits; ``bits_per_quantized_weight``, and ``bits_per_weight`` over all that is stored; ``files``: name -> size;
        ``note``: what another library's checkpoint asks to be rounded and nybble keeps in float, if anything.

    Raises:
        FileError: the folder can't be read, or config and tensors contradict each other.
    """
    folder = Path(folder)
    checkpoint = _of_others(folder) if is_others(folder) else _on_disk(read_checkpoint(folder))
    total: dict[str, int] = defaultdict(int)
    modules: dict[str, dict[str, Any]] = {
        n: {"elements": c, "bytes": defaultdict(int)} for n, c in checkpoint.elements.items()
    }
    parameters = 0
    for name, entry in checkpoint.stored.items():
        role = checkpoint.roles.get(name, "unquantized")
        wasted = checkpoint.padding.get(name, 0)
        total[role] += entry.nbytes - wasted
        if wasted:
            total["padding"] += wasted
        owner = checkpoint.owners.get(name) or next((p for p in _prefixes(name) if p in modules), None)
        if owner is not None:
            modules[owner]["bytes"][role] += entry.nbytes
        elif role == "unquantized":
            parameters += math.prod(entry.shape)
    total["headers"] += sum(header.data_start for header in checkpoint.headers)
    files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    weights = {header.path.name for header in checkpoint.headers}
    for name, size in files.items():
        if name not in weights:
            total[_file_role(name)] += size
    for found in modules.values():
        found["bytes"] = dict(found["bytes"])
        found["bits"] = 8 * sum(found["bytes"].values()) / max(1, found["elements"])
    elements = sum(checkpoint.elements.values())
    packed = sum(sum(found["bytes"].values()) for found in modules.values())
    stored = sum(entry.nbytes for entry in checkpoint.stored.values())
    result = {
        "total": sum(files.values()),
        "bytes": dict(total),
        "files": files,
        "parameters": elements + parameters,
        "quantized_parameters": elements,
        "bits_per_quantized_weight": 8 * packed / max(1, elements),
        "bits_per_weight": 8 * stored / max(1, elements + parameters),
        "modules": modules,
    }
    if checkpoint.note:
        result["note"] = checkpoint.note
    if sum(total.values()) != result["total"]:
        raise FileError(
            f"{folder}: {sum(total.values())} bytes are accounted for and {result['total']} are on disk; "
            "a file was changed."
        )
    return result


def _on_disk(found: Checkpoint) -> Checkpoint:
    """A checkpoint as its files have it, whatever their form."""
    if found.compressed is None:
        return found
    stored = {name: entry for header in found.headers for name, entry in header.tensors.items()}
    made = found.compressed
    return replace(found, stored=stored, roles=made.roles, owners=made.owners, padding={})


def _of_others(folder: Path) -> Checkpoint:
    """What another library's folder keeps, in the same words."""
    source = FolderSource(str(folder), folder)
    paths = sorted({path for path in source.weight_files() if path.suffix == ".safetensors"})
    headers = tuple(read_tensor_header(path) for path in paths)
    stored = {name: entry for header in headers for name, entry in header.tensors.items()}
    found = Checkpoint(read_json(folder / "config.json"), stored, headers, {}, [], note=source.rounded.left)
    found.roles.update(dict.fromkeys(source.rounded.used, "scales"))
    for name, weight in source.packed.items():
        found.elements[name] = math.prod(weight.shape)
        for role, part in weight.parts.items():
            found.roles[part], found.owners[part] = weight.kept_as[role], name
    return found


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts), 0, -1)]


def _file_role(name: str) -> str:
    if is_tokenizer_file(name):
        return "tokenizer"
    if name == "model.safetensors.index.json":
        return "headers"
    return "report" if name in ("nybble.json", "evaluation.json", "times.json", "report.html", CARD) else "config"
