"""Beside the weights: config, tokenizer, generation settings; and a model in memory as a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nybble.checkpoint.describe import describe_model
from nybble.checkpoint.parts import Parts, Writer
from nybble.core.errors import ModelError, UsageError
from nybble.core.explicit import explicit_settings
from nybble.core.files import AtomicFolder, check_new_folder, disk_errors
from nybble.data.kinds import DataKind
from nybble.models.sources.side_files import GENERATION
from nybble.nn.config import config_of
from nybble.nn.kinds import quant_modules
from nybble.nn.kv_model import recorded_kv

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from nybble.models.sources import ModelSource


_RECORD = "_nybble_record"  # in a model's __dict__, so that copies have it too


def mark_quantized(model: Any, quantization: dict[str, Any] | None = None) -> None:
    """Let ``model.save_pretrained`` write what ``from_pretrained`` loads.

    Args:
        model: with quantized modules.
        quantization: what describes them, if that is known already.
    """
    model.config.quantization_config = describe_model(model) if quantization is None else quantization
    keep_names(model)


def keep_names(model: Any) -> None:
    """Let ``save_pretrained`` write tensors as the model has them, under the names that describe them.

    Transformers would cut packed experts as it cuts float ones, and give some families' parts the names they once had.
    """
    model._weight_conversions = []


def keep_record(model: Any, record: dict[str, Any]) -> None:
    """Let :func:`save` write what a folder's manifest says of the run that quantized ``model``."""
    vars(model)[_RECORD] = record


def model_config(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Any]:
    """config.json's mapping for a model, with its architecture and dtype.

    Raises:
        ModelError: it has what JSON has not.
    """
    try:
        config = json.loads(model.config.to_json_string(use_diff=True))
        json.dumps(config, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ModelError(f"the config of {type(model).__name__} can't be written as JSON: {error}.") from error
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(dtype).removeprefix("torch.")
    return dict(config)


def save_side_files(kind: DataKind, source: ModelSource, model: PreTrainedModel, folder: Path) -> str:
    """Beside the weights: what the source has there, what the model's kind of data adds, and a generation config.

    Returns:
        what a later user will miss, in a line; else empty.

    Raises:
        FileError: they can't be written.
    """
    lacks = source.write_side_files(folder)
    kind.write_side_files(source, folder)
    if GENERATION not in source.side_files():
        _save_generation_config(model, folder)
    return lacks


def _save_generation_config(model: PreTrainedModel, folder: Path) -> None:
    """What the model generates with, as ``save_pretrained`` writes it; which refuses values that it has read."""
    if model.can_generate() and model.generation_config is not None:
        with disk_errors(folder / GENERATION):
            model.generation_config.to_json_file(folder / GENERATION, keys_to_pop=["compile_config"])


@explicit_settings()
def save(
    model: PreTrainedModel,
    out: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    manifest: dict[str, Any] | None = None,
    write: Writer | None = None,
) -> Path:
    """Write a model that was quantized in memory to a folder.

    Args:
        model: from :func:`nybble.quantize`, or after training from ``convert``.
        out: must not exist.
        tokenizer: to stand beside it; without one, text can't be made or judged with the folder.
        manifest: what nybble.json says; None takes what the model remembers of its quantization, if it does.
        write: writes another form than nybble's own.

    Raises:
        UsageError: nothing in it is quantized, its cache neither. FileError: the folder exists or can't be written.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"what is saved is a quantized model; got a {type(model).__name__}.")
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise UsageError(f"a tokenizer is transformers' (it has save_pretrained); got a {type(tokenizer).__name__}.")
    check_new_folder(out)
    if not any(True for _ in quant_modules(model)) and recorded_kv(model) is None:
        raise UsageError("nothing in this model is quantized; save float models with model.save_pretrained.")
    if config_of(model) is None:
        raise UsageError(
            f"{type(model).__name__} is a plain network: no config says how to build it again, so there is no folder "
            "for it. Keep its state_dict, or quantize it as a transformers model (its timm wrapper, say)."
        )
    if any(tensor.device.type == "meta" for tensor in (*model.parameters(), *model.buffers())):
        raise UsageError(
            "parts of this model are offloaded (device_map); model.save_pretrained writes the same tensors and brings "
            "each, or load it without."
        )
    out = Path(out)
    with AtomicFolder(out) as partial:
        parts = Parts(partial, {}, resume=False)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        _save_generation_config(model, partial)
        record = dict(vars(model).get(_RECORD, {}) if manifest is None else manifest)
        parts.write("model", "", model, record.pop("layers", []))
        parts.assemble(["model"], model_config(model, model.dtype), record, recorded_kv(model), write)
        parts.finish()
    return out
