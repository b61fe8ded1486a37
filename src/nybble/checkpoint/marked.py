"""Whether a folder holds a quantized model, and whose: from its config alone, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nybble.core.errors import FileError
from nybble.core.files import check_folder
from nybble.models.build.config_file import read_json
from nybble.models.named import is_packed, stated_quantization


def quantization_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """What nybble wrote into a ``config.json``; None where it wrote nothing.

    >>> quantization_of({"quantization_config": {"quant_method": "gptq"}}) is None
    True
    """
    found = config.get("quantization_config")
    return found if isinstance(found, dict) and found.get("quant_method") == "nybble" else None


def is_quantized(folder: Path) -> bool:
    """Whether ``folder`` holds a checkpoint that nybble wrote."""
    path = folder / "config.json"
    return path.is_file() and quantization_of(read_json(path)) is not None


def check_quantized(folder: Path) -> None:
    """Raise FileError unless ``folder`` is one that nybble wrote."""
    check_folder(folder)
    if quantization_of(read_json(folder / "config.json")) is None:
        raise FileError(f"{folder} is not a model that nybble wrote: its config.json has no quantization by nybble.")


def is_others(folder: Path) -> bool:
    """Whether ``folder`` holds a checkpoint that another library quantized and nybble reads."""
    path = folder / "config.json"
    return path.is_file() and is_packed(stated_quantization(folder, read_json(path)))


def check_readable(folder: Path) -> None:
    """Raise FileError unless ``folder`` holds a quantized model: nybble's, or another library's that nybble reads."""
    check_folder(folder)
    if not is_others(folder):
        check_quantized(folder)
