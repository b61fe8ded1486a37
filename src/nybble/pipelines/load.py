"""From whatever the user names to a model in memory."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from nybble.checkpoint.load import Beside, is_quantized, load_quantized
from nybble.core.errors import FileError, ModelError
from nybble.core.explicit import explicit_settings
from nybble.data import Origin
from nybble.data.kinds import data_kind
from nybble.models.adapter import reads_of
from nybble.models.sources.open import open_source
from nybble.models.sources.side_files import is_tokenizer_file, side_files
from nybble.nn.swap import hold_dense

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@explicit_settings()
def load(
    model: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", dense: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a model and its tokenizer: a folder that nybble wrote, or whatever :func:`open_source` takes.

    Models of text alone have a tokenizer; with one of images, or from a folder that holds no tokenizer, comes None.
    So it does, with a warning that says why, where the tokenizer can't be read: the model is of use without.

    Nothing in a folder is trusted: sizes, names and dtypes are compared with the files before memory is taken, and no
    code runs.

    Args:
        model: folder, GGUF file, hub id or ``demo:`` name.
        dtype: of the float parts; default what a quantized folder says, else bfloat16.
        device: where to.
        dense: keep dequantized copies of packed weights (faster, the same numbers).

    Raises:
        NybbleError: the model can't be read; nothing else escapes.
    """
    loaded, origin = load_with_origin(model, dtype=dtype, device=device, dense=dense)
    folder = Path(model)
    if folder.is_dir() and not any(is_tokenizer_file(name) for name in side_files(folder)):
        return loaded, None  # transformers would make up an empty one for some models, and fail for others
    try:
        return loaded, data_kind(reads_of(loaded)).tokenizer(origin)
    except (FileError, ModelError) as error:
        warnings.warn(f"{model} comes without its tokenizer: {error}", stacklevel=2)
        return loaded, None


@explicit_settings()
def load_with_origin(
    model: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", dense: bool = False
) -> tuple[PreTrainedModel, Origin]:
    """As :func:`load`; with what the model's place offers for making samples, of which nothing is read yet."""
    folder = Path(model)
    if not is_quantized(folder):
        source = open_source(str(model))
        return source.model(dtype or torch.bfloat16, device), source
    loaded = load_quantized(folder, dtype)
    nn.Module.to(loaded, device)
    if dense:
        hold_dense(loaded, loaded.dtype)
    return loaded, Beside(folder, loaded.config)
