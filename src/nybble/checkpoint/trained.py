"""What every byte of a training run's folder is for: the base in it, the adapter, the merged model, logs and pages."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nybble.core.tensorheader import read_tensor_header
from nybble.models.build.config_file import read_json

TRAINING = "training.json"
GENERATED = "generated.jsonl"
ADAPTER, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE, MERGED, LOGS = "base", "merged", "logs"


def is_trained(folder: Path) -> bool:
    """Whether a folder holds what training made: a record of ``nybble train``, or an adapter that PEFT saved."""
    return (folder / TRAINING).is_file() or is_adapter(folder)


def is_adapter(folder: Path) -> bool:
    """Whether what training made is no model of its own."""
    return any((folder / name).is_file() for name in (TRAINING, ADAPTER)) and not (folder / "config.json").exists()


def account_of_training(
    folder: Path, inspect: Callable[[Path], dict[str, Any]], file_role: Callable[[str], str]
) -> dict[str, Any]:
    """As :func:`nybble.checkpoint.account.inspect`, of a folder that :func:`is_adapter` knows.

    Args:
        folder: with an adapter; perhaps with ``base`` and ``merged``, each a model.
        inspect: of a model's folder.
        file_role: role of a file that holds no weights, by its name.

    Returns:
        the same keys. A merged model is one role, whose weights are not counted again; ``note`` names a base elsewhere.

    Raises:
        FileError: a file is missing or damaged.
    """
    header = read_tensor_header(folder / WEIGHTS)
    adapters = sum(math.prod(entry.shape) for entry in header.tensors.values())
    total: dict[str, int] = defaultdict(int)
    total["adapters"] = sum(entry.nbytes for entry in header.tensors.values())
    total["headers"] = header.data_start
    found: dict[str, Any] = {"parameters": 0, "quantized_parameters": 0, "bits_per_quantized_weight": 0.0}
    found |= {"bits_per_weight": 0.0, "modules": {}, "formats": []}
    if (folder / BASE).is_dir():
        found = inspect(folder / BASE)
        for role, count in found["bytes"].items():
            total[role] += count
    else:
        found["note"] = f"The base is in {read_json(folder / ADAPTER).get('base_model_name_or_path')}."
    files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    for name, size in files.items():
        place = name.partition("/")[0] if "/" in name else ""
        if place == MERGED:
            total["merged model"] += size
        elif place != BASE and name != WEIGHTS:
            total[file_role(name)] += size
    stored = found["bits_per_weight"] * found["parameters"] / 8 + total["adapters"]
    parameters = found["parameters"] + adapters
    sizes = {"total": sum(files.values()), "bytes": dict(total), "files": files}
    return found | sizes | {"parameters": parameters, "bits_per_weight": 8 * stored / max(1, parameters)}
