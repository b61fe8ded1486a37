"""From whatever the user names to a model in memory."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nybble.checkpoint.load import Beside, described, load_quantized
from nybble.checkpoint.marked import is_quantized
from nybble.checkpoint.save import mark_quantized
from nybble.core.device import check_device
from nybble.core.dtypes import float_dtype
from nybble.core.errors import FileError, ModelError, UsageError
from nybble.core.explicit import explicit_settings
from nybble.data import Origin
from nybble.data.kinds import data_kind
from nybble.models.adapter import reads_of
from nybble.models.build.packed import packed_model
from nybble.models.build.spread import spread
from nybble.models.sources.folder import FolderSource
from nybble.models.sources.open import open_source
from nybble.models.sources.side_files import is_tokenizer_file, side_files
from nybble.nn.swap import hold_dense

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@explicit_settings()
def load(
    model: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    dense: bool = False,
    packed: bool = False,
    device_map: str | Mapping[str, Any] | None = None,
    max_memory: Mapping[Any, int | str] | None = None,
    offload_folder: str | Path | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a model and its tokenizer: a folder that nybble wrote, or whatever :func:`open_source` takes.

    A folder that another library quantized keeps its weights packed, with that library's codes and scales. Those of a
    GGUF file become floats, unless ``packed`` says otherwise.

    Models of text alone have a tokenizer; with one of images, or from a folder that holds no tokenizer, comes None.
    So it does, with a warning that says why, where the tokenizer can't be read: the model is of use without.

    Nothing in a folder is trusted: sizes, names and dtypes are compared with the files before memory is taken, and no
    code runs.

    Args:
        model: folder, GGUF file, hub id or ``demo:`` name.
        dtype: of the float parts: float32, bfloat16 or float16, by name or torch's; default what a quantized folder
            says, else bfloat16.
        device: where to.
        dense: keep dequantized copies of packed weights (faster, the same numbers).
        packed: keep the weights of a GGUF file packed too, in its blocks' codes and scales.
        device_map: in place of ``device``: where each part is to run, as transformers and accelerate take it
            (:func:`nybble.models.build.spread.spread`). The model is read into memory first; a folder of nybble's that
            doesn't fit there goes part by part with ``AutoModelForCausalLM.from_pretrained(..., device_map=...)``.
        max_memory: for ``device_map="auto"``.
        offload_folder: where what goes to disk is kept while the model lives; default the system's temporary place.

    Raises:
        UsageError: options that contradict each other, or a device_map that accelerate can't follow. NybbleError: the
            model can't be read; nothing else escapes.
    """
    if device_map is None and (max_memory is not None or offload_folder is not None):
        raise UsageError("max_memory and offload_folder say how to follow a device_map; give one, or leave them out.")
    if device_map is not None and (dense or str(device) != "cpu"):
        other = (
            "dense=True keeps copies that can't be moved" if dense else f"device={str(device)!r} is a map of its own"
        )
        raise UsageError(f"{other}; leave it out, or device_map.")
    if not isinstance(model, str | Path):
        raise UsageError(f"a model to load is a folder, a GGUF file or a hub id; got a {type(model).__name__}.")
    loaded, origin = load_with_origin(model, dtype=dtype, device=device, dense=dense, packed=packed)
    if device_map is not None:
        spread(loaded, device_map, max_memory, offload_folder)
    folder = Path(model)
    if folder.is_dir() and not any(is_tokenizer_file(name) for name in side_files(folder)):
        return loaded, None  # transformers would make up an empty one for some models, and fail for others
    try:
        return loaded, data_kind(reads_of(loaded)).tokenizer(origin)
    except (FileError, ModelError) as error:
        warnings.warn(f"{model} comes without its tokenizer: {error}", stacklevel=2)
        return loaded, None


def described_with_origin(model: str | Path) -> tuple[PreTrainedModel, Origin]:
    """The model without weights, on the meta device: enough to say what it reads; and its place, as below."""
    folder = Path(model)
    if not is_quantized(folder):
        source = open_source(str(model))
        return source.skeleton(torch.bfloat16), source
    found = described(folder)
    return found, Beside(folder, found.config)


@explicit_settings()
def load_with_origin(
    model: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    dense: bool = False,
    packed: bool = False,
) -> tuple[PreTrainedModel, Origin]:
    """As :func:`load`; with what the model's place offers for making samples, of which nothing is read yet."""
    folder = Path(model)
    wanted = None if dtype is None else float_dtype(dtype, "dtype")
    device = torch.device(check_device(device))
    if not is_quantized(folder):
        source = open_source(str(model))
        if not source.packed_names() or not (packed or isinstance(source, FolderSource)):
            return source.model(wanted or torch.bfloat16, device), source
        loaded = packed_model(source, wanted or torch.bfloat16)
        mark_quantized(loaded)
        nn.Module.to(loaded, device)
        if dense:
            hold_dense(loaded, loaded.dtype)
        return loaded, source
    loaded = load_quantized(folder, wanted)
    nn.Module.to(loaded, device)
    if dense:
        hold_dense(loaded, loaded.dtype)
    return loaded, Beside(folder, loaded.config)
