"""What every byte of a model is for; the sum is the size on disk, and there is no "other"."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nybble.checkpoint.card import CARD
from nybble.checkpoint.foreign import of_folder, of_gguf
from nybble.checkpoint.marked import MANIFEST, is_quantized
from nybble.checkpoint.read import Checkpoint, read_checkpoint
from nybble.checkpoint.trained import GENERATED, LOGS, TRAINING, account_of_training, is_adapter
from nybble.core.errors import FileError
from nybble.models.sources.gguf_file import GgufSource
from nybble.models.sources.open import open_source
from nybble.models.sources.side_files import is_tokenizer_file

REPORTS = ("nybble.json", "evaluation.json", "times.json", TRAINING, "report.html", "layers.html", CARD)


def inspect(model: str | Path) -> dict[str, Any]:
    """Bytes by role, by module and by file, of any model that opens.

    Args:
        model: a folder that nybble wrote (a training run's too), another library's quantized model, a GGUF file, a
            float model; a hub id.

    Returns:
        ``bytes``: role -> bytes (codes, scales, offsets, tables, padding, unquantized, headers, config, tokenizer ...),
        which add up to ``total``, the size of all files; ``modules``: per quantized weight its ``format``, bytes by
        role, elements, bits; ``formats``: a row for what is alike, with ``weights``, how many, ``elements`` and
        ``bits``; ``bits_per_quantized_weight``, and ``bits_per_weight`` over all that is stored; ``files``: name ->
        size; ``note``: what another library's checkpoint asks to be rounded and nybble keeps in float, if anything.

    Raises:
        FileError: it can't be read, or config and tensors contradict each other. ModelError: no model.
    """
    place = Path(model)
    if place.is_dir() and is_adapter(place):
        return account_of_training(place, inspect, _file_role)
    if place.is_dir() and (is_quantized(place) or (place / MANIFEST).is_file()):
        checkpoint = _on_disk(read_checkpoint(place))
    else:
        source = open_source(str(model))
        checkpoint = of_gguf(source) if isinstance(source, GgufSource) else of_folder(source)
        place = source.path if isinstance(source, GgufSource) else checkpoint.headers[0].path.parent
    total: dict[str, int] = defaultdict(int)
    modules: dict[str, dict[str, Any]] = {
        n: {"format": checkpoint.formats[n], "elements": c, "bytes": defaultdict(int)}
        for n, c in checkpoint.elements.items()
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
    files = {str(p.relative_to(place)): p.stat().st_size for p in sorted(place.rglob("*")) if p.is_file()}
    files = files or {place.name: place.stat().st_size}
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
        "formats": _formats(modules),
    }
    if checkpoint.note:
        result["note"] = checkpoint.note
    if sum(total.values()) != result["total"]:
        raise FileError(
            f"{model}: {sum(total.values())} bytes are accounted for and {result['total']} are on disk; "
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


def _formats(modules: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What is alike in one row, the largest first."""
    rows: dict[str, dict[str, Any]] = {}
    for found in modules.values():
        row = rows.setdefault(found["format"], {"format": found["format"], "weights": 0, "elements": 0, "bits": 0.0})
        row["weights"] += 1
        row["elements"] += found["elements"]
        row["bits"] += 8 * sum(found["bytes"].values())
    for row in rows.values():
        row["bits"] /= max(1, row["elements"])
    return sorted(rows.values(), key=lambda row: -row["elements"])


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts), 0, -1)]


def _file_role(name: str) -> str:
    if is_tokenizer_file(name):
        return "tokenizer"
    if name == "model.safetensors.index.json":
        return "headers"
    if name.startswith(f"{LOGS}/"):
        return "logs"
    if name == GENERATED:
        return "generated texts"
    if name.endswith(".gguf"):  # of a folder's own target, beside its weights
        return "exported"
    return "report" if name in REPORTS else "config"
