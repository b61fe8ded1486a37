"""From files to models and back: float models from any source, quantized ones from the folders that nybble writes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nybble.core.errors import FileError, UsageError
from nybble.core.files import AtomicFolder
from nybble.models.adapter import reads_of
from nybble.models.config_file import make_config, read_json
from nybble.models.guard import reading
from nybble.models.skeleton import expected_tensors, fill_buffers_, meta_model
from nybble.models.source import open_source
from nybble.nn.swap import Layouts, hold_dense, prepare_quantized, put_described, quant_modules
from nybble.pipelines.checkpoint import Parts, mark_quantized, model_config
from nybble.pipelines.inspect import Checkpoint, read_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


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
    loaded = _load_quantized(folder, dtype)
    nn.Module.to(loaded, device)
    if dense:
        hold_dense(loaded, loaded.dtype)
    return loaded, None if _of_images(loaded) else _tokenizer(folder, loaded.config)


def _of_images(model: PreTrainedModel) -> bool:
    return reads_of(model.config) == "images"


def is_quantized(folder: Path) -> bool:
    """Whether ``folder`` holds a checkpoint that nybble wrote."""
    path = folder / "config.json"
    if not path.is_file():
        return False
    quantization = read_json(path).get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == "nybble"


def _load_quantized(folder: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    checkpoint = read_checkpoint(folder)
    config = make_config(dict(checkpoint.config), str(folder / "config.json"))
    stated = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    model = meta_model(config, dtype or stated, len(checkpoint.stored))
    layouts = Layouts(checkpoint.layouts)
    with torch.device("meta"):
        for name, entry in checkpoint.modules.items():
            put_described(model, name, entry, layouts)
    prepare_quantized(model)
    _check_names(folder, checkpoint, expected_tensors(model))
    tensors = _read(folder, checkpoint, dtype)
    fill_buffers_(model)
    with reading(folder):
        model.load_state_dict(tensors, strict=False, assign=True)
        model.tie_weights()
        mark_quantized(model, checkpoint.config["quantization_config"])
        generation = folder / "generation_config.json"
        if generation.is_file() and model.can_generate():
            from transformers import GenerationConfig

            model.generation_config = GenerationConfig.from_dict(read_json(generation))
    return nn.Module.eval(model)


def _check_names(folder: Path, checkpoint: Checkpoint, expected: dict[str, Tensor]) -> None:
    """Every tensor of the model is in the files with its shape, tied ones at least once, and no other."""
    stored = {id(tensor) for name, tensor in expected.items() if name in checkpoint.stored}
    for name, tensor in expected.items():
        found = checkpoint.stored.get(name)
        if found is None and id(tensor) not in stored:
            raise FileError(f"{folder}: the model needs {name}, which the weight files do not hold.")
        if found is not None and tuple(found.shape) != tuple(tensor.shape):
            raise FileError(f"{folder}: {name} is {list(found.shape)}; config.json says {list(tensor.shape)}.")
    unknown = [name for name in checkpoint.stored if name not in expected]
    if unknown:
        raise FileError(f"{folder}: the weight files hold {unknown[0]}, which the model of config.json does not have.")


def _read(folder: Path, checkpoint: Checkpoint, dtype: torch.dtype | None) -> dict[str, Tensor]:
    from safetensors import safe_open

    tensors: dict[str, Tensor] = {}
    for header in checkpoint.headers:
        with reading(header.path), safe_open(header.path, framework="pt", device="cpu") as file:
            for name in header.tensors:
                tensor = file.get_tensor(name).clone()  # not a map of the file, which may change
                cast = dtype is not None and tensor.is_floating_point() and name not in checkpoint.expected
                tensors[name] = tensor.to(dtype) if cast else tensor
    return tensors


def _tokenizer(folder: Path, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    with reading(f"the tokenizer of {folder}"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), config=config, trust_remote_code=False, local_files_only=True
        )
    return tokenizer


def save(
    model: PreTrainedModel,
    out: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    manifest: dict[str, Any] | None = None,
) -> Path:
    """Write a model that was quantized in memory to a folder, as ``nybble quantize`` would.

    Raises:
        UsageError: nothing in it is quantized. FileError: the folder exists or can't be written.
    """
    if not any(True for _ in quant_modules(model)):
        raise UsageError("nothing in this model is quantized; save float models with model.save_pretrained.")
    if not hasattr(model, "config"):
        raise UsageError(
            f"{type(model).__name__} is a plain network: no config says how to build it again, so there is no folder "
            "for it. Keep its state_dict, or quantize it as a transformers model (its timm wrapper, say)."
        )
    out = Path(out)
    with AtomicFolder(out) as partial:
        parts = Parts(partial, {}, resume=False)
        parts.write("model", "", model, [])
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if model.can_generate() and model.generation_config is not None:
            model.generation_config.save_pretrained(partial)
        parts.assemble(["model"], model_config(model, model.dtype), manifest or {})
        parts.finish()
    return out
