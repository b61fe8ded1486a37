"""From files to models and back: float models from any source, quantized ones from the folders that nybble writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nybble.core.errors import FileError, UsageError
from nybble.core.files import AtomicFolder
from nybble.models.guard import reading
from nybble.models.source import open_source
from nybble.nn.swap import hold_dense, quant_modules
from nybble.pipelines.checkpoint import Parts, model_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load(
    model: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", dense: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer: a folder that nybble wrote, or whatever :func:`open_source` takes.

    Args:
        model: folder, GGUF file, hub id or ``demo:`` name.
        dtype: of the float parts; default what a quantized folder says, else bfloat16.
        device: where to. dense: keep dequantized copies of packed weights (faster, the same numbers).

    Raises:
        NybbleError: the model can't be read; nothing else escapes.
    """
    folder = Path(model)
    if not is_quantized(folder):
        source = open_source(str(model))
        return source.model(dtype or torch.bfloat16, device), source.tokenizer()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_checkpoint(folder)
    with reading(folder):
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto", local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    loaded = loaded.to(device).eval()
    if dense:
        hold_dense(loaded, loaded.dtype)
    return loaded, tokenizer


def is_quantized(folder: Path) -> bool:
    """Whether ``folder`` holds a checkpoint that nybble wrote."""
    path = folder / "config.json"
    if not path.is_file():
        return False
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return bool(config["quantization_config"]["quant_method"] == "nybble")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_checkpoint(folder: Path) -> None:
    """Compare config.json's descriptions with the tensors that are really in the file.

    Raises:
        FileError: a described tensor is missing or of another shape or dtype, or the header is malformed.
    """
    from nybble.pipelines.inspect import read_checkpoint

    checkpoint = read_checkpoint(folder)
    for name, (dtype, shape) in checkpoint.expected.items():
        found = checkpoint.stored.get(name)
        if found is None:
            raise FileError(f"{folder}: config.json describes {name}, which the weights file does not hold.")
        if (found.dtype, list(found.shape)) != (dtype, list(shape)):
            raise FileError(f"{folder}: {name} should be {dtype} {list(shape)}; the file has {found.dtype} {list(found.shape)}.")


def save(model: nn.Module, out: str | Path, tokenizer: Any = None, manifest: dict[str, Any] | None = None) -> Path:
    """Write a model that was quantized in memory to a folder, as ``nybble quantize`` would.

    Raises:
        UsageError: nothing in it is quantized. FileError: the folder exists or can't be written.
    """
    if not any(True for _ in quant_modules(model)):
        raise UsageError("nothing in this model is quantized; save float models with model.save_pretrained.")
    out = Path(out)
    with AtomicFolder(out) as partial:
        parts = Parts(partial, {}, resume=False)
        parts.write("model", "", _Untied(model), [])
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(partial)
        parts.assemble(["model"], model_config(model, model.dtype), manifest or {})  # type: ignore[arg-type]
    return out


class _Untied(nn.Module):
    """A model's state dict with each tied tensor once."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = (model,)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        seen: dict[int, str] = {}
        for name, tensor in self._model[0].state_dict(keep_vars=True).items():
            seen.setdefault(id(tensor), name)
        return {name: t.detach() for name, t in self._model[0].state_dict(keep_vars=True).items() if seen[id(t)] == name}

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        return self._model[0].named_modules()


