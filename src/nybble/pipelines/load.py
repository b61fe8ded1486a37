"""From whatever the user names to a model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from nybble.checkpoint.load import is_quantized, load_quantized, read_tokenizer
from nybble.models.adapter import reads_of
from nybble.models.sources.open import open_source
from nybble.nn.swap import hold_dense

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load(
    model: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", dense: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a model and its tokenizer: a folder that nybble wrote, or whatever :func:`open_source` takes.

    A model of images has no tokenizer: None.

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
    folder = Path(model)
    if not is_quantized(folder):
        source = open_source(str(model))
        float_model = source.model(dtype or torch.bfloat16, device)
        return float_model, None if _of_images(float_model) else source.tokenizer()
    loaded = load_quantized(folder, dtype)
    nn.Module.to(loaded, device)
    if dense:
        hold_dense(loaded, loaded.dtype)
    return loaded, None if _of_images(loaded) else read_tokenizer(folder, loaded.config)


def _of_images(model: PreTrainedModel) -> bool:
    return reads_of(model.config) == "images"
