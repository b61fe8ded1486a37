"""What a user may name as a model, seen without opening it and without torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nybble.core.errors import FileError, ModelError, UsageError
from nybble.core.registry import Registry
from nybble.models.build.config_file import read_json

LAYOUTS = Registry("nybble.models.sources.layouts", "layout of quantized checkpoints")
"""By ``quant_method``: others' quantized checkpoints that are read (:mod:`nybble.models.sources.layouts`)."""
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


QUANTIZED = ("quantization_config", "compression_config")
"""Keys of config.json that say how a model is quantized; the second is an older name."""
MODELOPT = "hf_quant_config.json"
MLX = ("quantization", "quantize_activations")
"""Keys of config.json in MLX's folders; the first says how, and ``quantization_config`` repeats it without a method."""
STATED = (*QUANTIZED, *MLX)
"""All keys of config.json that say how a model is quantized."""


def stated_quantization(folder: Path, config: Mapping[str, Any]) -> Any:
    """What config.json, or ModelOpt's file beside it, says of how a model is quantized; None for a float one.

    MLX's folders name no method: theirs is what stands under ``quantization``, with the ``quant_method`` mlx.

    Raises:
        FileError: that file is no JSON object.
    """
    stated = next((config[key] for key in QUANTIZED if config.get(key)), None)
    by_mlx = config.get(MLX[0])
    if isinstance(by_mlx, dict) and not (isinstance(stated, dict) and stated.get("quant_method")):
        return {**by_mlx, MLX[1]: bool(config.get(MLX[1])), "quant_method": "mlx"}
    if stated:
        return stated
    if not (folder / MODELOPT).is_file():
        return None
    found = read_json(folder / MODELOPT)
    return {**found, "quant_method": "modelopt"} if isinstance(found.get("quantization"), dict) else None


def is_packed(quantization: Any) -> bool:
    """Whether a model's ``quantization_config`` is of a layout that nybble reads; nothing is imported."""
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return isinstance(method, str) and method in LAYOUTS


def check_float(model: str, quantization: Any) -> None:
    """Raise ModelError where a model's ``quantization_config`` says that it is quantized in a way that nobody reads.

    What :func:`is_packed` is read as the float model that it stands for.
    """
    if quantization and not is_packed(quantization):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        way = ", or from what `nybble export MODEL DEST --target dense` makes of this" if method == "nybble" else ""
        raise ModelError(f"{model} is already quantized ({method}); start from the float model instead{way}.")
