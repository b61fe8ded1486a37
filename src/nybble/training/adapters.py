"""A saved PEFT adapter beside a packed model, after everything that can be wrong with it has been looked for.

PEFT itself passes over names that are missing or too many, with a warning.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
from torch import nn

from nybble.core.errors import FileError, ModelError, did_you_mean
from nybble.core.guard import reading
from nybble.core.seeds import preserve_global_rng
from nybble.core.tensorheader import read_tensor_header
from nybble.nn.in_place import whole_or_not_at_all
from nybble.training import peft_hook  # noqa: F401  (packed layers take adapters from here on)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def load_adapter(model: nn.Module, folder: str | Path, *, trainable: bool = False) -> nn.Module:
    """The model with the LoRA adapter that a folder holds, as PEFT's model.

    Args:
        model: what ``nybble.load`` gives; changed in place, and as it was where the adapter is refused.
        folder: with adapter_config.json and adapter_model.safetensors.
        trainable: whether the adapter is to be trained on.

    Raises:
        FileError: the folder holds no adapter, or a broken one. ModelError: it is no LoRA, or of another model.
    """
    folder = Path(folder)
    config = config_of_adapter(folder)
    config.inference_mode, config.base_model_name_or_path = not trainable, None  # PEFT warns of another name
    header = read_tensor_header(folder / WEIGHTS)
    stored = {name: tuple(entry.shape) for name, entry in header.tensors.items()}
    with preserve_global_rng(), whole_or_not_at_all(model):
        found: Any = with_adapter(model, config, f"{folder} is an adapter of another model")
        kept: Any = peft.get_peft_model_state_dict(found, save_embedding_layers=False)  # the base has them
        own = {name: tuple(t.shape) for name, t in kept.items()}
        _check_names(folder, stored, own)
        with reading(folder / WEIGHTS):
            peft.set_peft_model_state_dict(found, peft.load_peft_weights(str(folder), device="cpu"))
    made: nn.Module = found if trainable else found.eval()
    return made


def with_adapter(model: nn.Module, config: Any, what: str) -> nn.Module:
    """The model with new adapters, as PEFT's; changed in place, or as it was.

    Args:
        model: packed.
        config: PEFT's.
        what: is wrong where PEFT finds no layer for it.

    Raises:
        ModelError: it finds none.
    """
    with whole_or_not_at_all(model), warnings.catch_warnings():
        # PEFT asks transformers in words that its newest release calls old.
        warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
        try:
            found: nn.Module = peft.get_peft_model(model, config)
        except ValueError as error:
            raise ModelError(f"{what}: {' '.join(str(error).split())}") from error
    return found


def config_of_adapter(folder: Path) -> Any:
    """PEFT's config of the LoRA adapter that a folder holds; errors as of :func:`load_adapter`."""
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        missing = CONFIG if not (folder / CONFIG).is_file() else WEIGHTS
        raise FileError(f"{folder} holds no adapter: {missing} is missing. Give a folder that PEFT saved one into.")
    with reading(folder / CONFIG):
        kind = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{folder} holds an adapter of the kind {kind}; beside packed weights LORA is known.")
    with reading(folder / CONFIG):
        return peft.PeftConfig.from_pretrained(str(folder))


def _check_names(folder: Path, stored: dict[str, Any], own: dict[str, Any]) -> None:
    strange = next((name for name in stored if name not in own), None)
    missing = next((name for name in own if name not in stored), None)
    if strange is not None:
        raise ModelError(f"{folder} is an adapter of another model: it has {strange}.{did_you_mean(strange, own)}")
    if missing is not None:
        raise ModelError(f"{folder} is an adapter of another model: it lacks {missing}.")
    for name, shape in stored.items():
        if shape != own[name]:
            raise ModelError(f"{folder} is an adapter of another model: {name} is {shape}, and here {own[name]}.")
