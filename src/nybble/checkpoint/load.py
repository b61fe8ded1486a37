"""From files to models and back: float models from any source, quantized ones from the folders that nybble writes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nybble.checkpoint.describe import restore_model
from nybble.checkpoint.read import Checkpoint, Tensors, read_checkpoint
from nybble.checkpoint.save import mark_quantized
from nybble.core.errors import FileError
from nybble.core.guard import reading
from nybble.models.build.config_file import make_config
from nybble.models.build.skeleton import expected_tensors, fill_buffers_, kept_float32, meta_model, unsaved
from nybble.models.sources.folder import read_generation_config, read_preprocessing, read_tokenizer
from nybble.models.sources.side_files import side_files
from nybble.nn.packed import validate_packed

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_quantized(folder: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model in a folder that nybble wrote, on the CPU; float parts in ``dtype``, or as its config says."""
    checkpoint = read_checkpoint(folder)
    model = _skeleton(folder, checkpoint, dtype, filled=True)
    expected = expected_tensors(model)
    _check_names(folder, checkpoint, expected, unsaved(model))
    tensors = _read(checkpoint, dtype, kept_float32(model))
    kept = {id(expected[name]): tensor for name, tensor in tensors.items()}
    tensors |= {name: kept[id(tied)] for name, tied in expected.items() if id(tied) in kept and name not in tensors}
    with reading(folder):
        model.load_state_dict(tensors, strict=False, assign=True)
        validate_packed(model)
        model.tie_weights()
        mark_quantized(model, checkpoint.config["quantization_config"])
        generation = read_generation_config(folder) if model.can_generate() else None
        if generation is not None:
            model.generation_config = generation
    return nn.Module.eval(model)


def described(folder: Path) -> PreTrainedModel:
    """The quantized model that a folder's config.json describes, on the meta device; no tensor is read."""
    return _skeleton(folder, read_checkpoint(folder), None)


def check_complete(folder: Path, checkpoint: Checkpoint) -> None:
    """Whether the files hold every tensor of the model that config.json describes, and no other; none is read.

    Raises:
        FileError: one is missing, of another shape, or of another model.
    """
    model = _skeleton(folder, checkpoint, None)
    _check_names(folder, checkpoint, expected_tensors(model), unsaved(model))


def _skeleton(folder: Path, checkpoint: Checkpoint, dtype: torch.dtype | None, filled: bool = False) -> PreTrainedModel:
    config = make_config(dict(checkpoint.config), str(folder / "config.json"))
    stated = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    model = meta_model(config, dtype or stated, checkpoint.stored)
    if filled:  # while everything is in float, as the family's initialiser expects it
        fill_buffers_(model)
    restore_model(model, checkpoint.modules, checkpoint.layouts, checkpoint.kv)
    return model


def _check_names(folder: Path, checkpoint: Checkpoint, expected: dict[str, Tensor], computed: frozenset[str]) -> None:
    """Every tensor of the model is in the files with its shape, tied ones at least once, computed ones or not."""
    stored = {id(tensor) for name, tensor in expected.items() if name in checkpoint.stored}
    for name, tensor in expected.items():
        found = checkpoint.stored.get(name)
        if found is None and id(tensor) not in stored and name not in computed:
            raise FileError(f"{folder}: the model needs {name}, which the weight files do not hold.")
        if found is not None and tuple(found.shape) != tuple(tensor.shape):
            raise FileError(f"{folder}: {name} is {list(found.shape)}; config.json says {list(tensor.shape)}.")
    unknown = [name for name in checkpoint.stored if name not in expected]
    if unknown:
        raise FileError(f"{folder}: the weight files hold {unknown[0]}, which the model of config.json does not have.")


def _read(checkpoint: Checkpoint, dtype: torch.dtype | None, kept: Collection[str]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    files = Tensors(checkpoint)
    for name in checkpoint.stored:
        tensor = files.get(name)
        wanted = torch.float32 if name in kept else dtype
        cast = wanted is not None and tensor.is_floating_point() and name not in checkpoint.expected
        tensors[name] = tensor.to(wanted) if cast else tensor
    return tensors


@dataclass(frozen=True)
class Beside:
    """What stands beside the weights in a folder that nybble wrote, as data needs it (:class:`nybble.data.Origin`)."""

    folder: Path
    config: PreTrainedConfig

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; no code of the folder runs.

        Raises:
            FileError: there is none, or it is broken.
        """
        with reading(f"the tokenizer of {self.folder}"):
            return read_tokenizer(self.folder, self.config)

    def preprocessing(self) -> dict[str, Any]:
        """As preprocessor_config.json says, if there is one."""
        return read_preprocessing(self.folder)

    def side_files(self) -> Mapping[str, Path]:
        """Those that the folder has."""
        return side_files(self.folder)
