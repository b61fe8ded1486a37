"""What a user may name as a model, seen without opening it and without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nybble.core.errors import FileError, ModelError, UsageError

_NOTE = "Give a folder with config.json and safetensors, a .gguf file, a hub id (owner/name) or demo:smollm2."


def check_model(spec: str) -> None:
    """Refuse what can't name a model, without opening it.

    Raises:
        UsageError: an empty name. FileError: a path that doesn't exist.
    """
    if not spec.strip():
        raise UsageError(f"the model's name is empty. {_NOTE}")
    written_as_path = spec.startswith((".", "/", "~")) or spec.lower().endswith(".gguf") or spec.count("/") > 1
    if written_as_path and not Path(spec).exists():
        raise FileError(f"there is no {spec}. {_NOTE}")


def check_float(model: str, quantization: Any) -> None:
    """Raise ModelError where a model's ``quantization_config`` says that it is quantized already, by whatever."""
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ModelError(f"{model} is already quantized ({method}); start from the float model instead.")
