"""What every byte of a quantized model is for; the sum is the size on disk, and there is no "other"."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nybble.core.errors import FileError, NybbleError
from nybble.core.tensorheader import TensorEntry, TensorHeader, read_tensor_header
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.swap import Layouts

_SHORT = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8", "int8": "I8", "int32": "I32", "int16": "I16", "int64": "I64"}


@dataclass(frozen=True)
class Checkpoint:
    """A folder's tensors as they are, and as config.json says they should be.

    Attributes:
        stored: name -> entry of a safetensors header. expected: name -> (dtype, shape) of each quantized module's tensor.
        roles: name -> codes, scales, offsets, tables or unquantized. padding: bytes that packing wastes, by name.
        elements: name of a quantized weight -> its number of elements. headers: the weight files' headers.
    """

    stored: dict[str, TensorEntry]
    expected: dict[str, tuple[str, list[int]]]
    roles: dict[str, str]
    padding: dict[str, int]
    elements: dict[str, int]
    headers: tuple[TensorHeader, ...]


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read config.json and the weight files' headers.

    Raises:
        FileError: missing, malformed, or not written by nybble; nothing else escapes.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        quantization = config["quantization_config"]
        modules, layouts = quantization["modules"], Layouts(quantization["layouts"])
        expected: dict[str, tuple[str, list[int]]] = {}
        roles: dict[str, str] = {}
        padding: dict[str, int] = {}
        elements: dict[str, int] = {}
        for name, entry in modules.items():
            numbers = {f"{name}.weight": entry["weight"]} if "weight" in entry else {}
            numbers |= {f"{name}.experts.{i}": n for i, n in enumerate(entry.get("weights", []))}
            for prefix, number in numbers.items():
                with torch.device("meta"):
                    qtensor = layouts.empty(int(number))
                elements[prefix] = math.prod(qtensor.shape)
                for key, tensor in qtensor.tensors().items():
                    expected[f"{prefix}.{key}"] = (_SHORT[str(tensor.dtype).removeprefix("torch.")], list(tensor.shape))
                    roles[f"{prefix}.{key}"] = qtensor.roles()[key]
                wasted = qtensor.padding_bytes()
                if wasted.get("codes"):
                    padding[f"{prefix}.codes"] = wasted["codes"]
            for side in ("inputs", "outputs"):
                if side in entry:
                    for key, tensor in ActivationQuantizer.from_dict(entry[side]).state_dict().items():
                        expected[f"{name}.{side}.{key}"] = ("F32", list(tensor.shape))
                        roles[f"{name}.{side}.{key}"] = "scales" if key == "scale" else "offsets"
    except NybbleError as error:
        raise FileError(f"{folder}: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise FileError(f"{folder} is not a model that nybble wrote ({type(error).__name__}: {error}).") from error
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileError(f"{folder} holds no .safetensors file.")
    headers = tuple(read_tensor_header(file) for file in files)
    stored = {name: entry for header in headers for name, entry in header.tensors.items()}
    return Checkpoint(stored, expected, roles, padding, elements, headers)


def inspect(folder: str | Path) -> dict[str, Any]:
    """Bytes by role, by module and by file.

    Returns:
        ``bytes``: role -> bytes (codes, scales, offsets, tables, padding, unquantized, headers, config, tokenizer ...), which add up to
        ``total``, the size of all files; ``modules``: per quantized weight bytes by role, elements, bits; ``bits_per_weight`` over
        quantized weights and over all parameters; ``files``: name -> size.

    Raises:
        FileError: the folder can't be read, or config and tensors contradict each other.
    """
    folder = Path(folder)
    checkpoint = read_checkpoint(folder)
    total: dict[str, int] = defaultdict(int)
    modules: dict[str, dict[str, Any]] = {n: {"elements": c, "bytes": defaultdict(int)} for n, c in checkpoint.elements.items()}
    parameters = 0
    for name, entry in checkpoint.stored.items():
        role = checkpoint.roles.get(name, "unquantized")
        wasted = checkpoint.padding.get(name, 0)
        total[role] += entry.nbytes - wasted
        if wasted:
            total["padding"] += wasted
        owner = next((prefix for prefix in _prefixes(name) if prefix in modules), None)
        if owner is not None:
            modules[owner]["bytes"][role] += entry.nbytes
        elif role == "unquantized":
            parameters += math.prod(entry.shape)
    total["headers"] += sum(header.data_start for header in checkpoint.headers)
    files = {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file()}
    weight_files = {header.path.name for header in checkpoint.headers}
    for name, size in files.items():
        if name not in weight_files:
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
    if sum(total.values()) != result["total"]:
        raise FileError(f"{folder}: {sum(total.values())} bytes are accounted for and {result['total']} are on disk; a file was changed.")
    return result


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts), 0, -1)]


def _file_role(name: str) -> str:
    if name.startswith(("tokenizer", "special_tokens", "vocab", "merges", "chat_template", "added_tokens")):
        return "tokenizer"
    if name == "model.safetensors.index.json":
        return "headers"
    return "report" if name in ("nybble.json", "report.html") else "config"
