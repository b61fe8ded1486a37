"""Checkpoints that other libraries' own writers make of a tiny llama, and the weights that they read from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tests.tiny import tiny_model, tiny_tokenizer
from torch import Tensor, nn

SIZES = {"hidden_size": 64, "intermediate_size": 96, "attention_bias": False}


def llama(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """Float, with layers of 64 and 96 columns."""
    return tiny_model("llama", dtype, **{**SIZES, **changes})


def linears(model: Any) -> dict[str, nn.Linear]:
    """Those inside the blocks."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith("model.layers.")}


def write(folder: Path, model: Any, tensors: dict[str, Tensor], quantization: dict[str, Any] | None) -> Path:
    """A folder with these tensors in place of the model's own."""
    folder.mkdir()
    config = json.loads(model.config.to_json_string(use_diff=False))
    config["architectures"] = [type(model).__name__]
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config, default=str))
    save_file({n: t.detach().contiguous().clone() for n, t in tensors.items()}, folder / "model.safetensors")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def swapped(model: Any, made: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The model's tensors with those of some modules, by module and leaf, in place of their weights."""
    kept = {
        n: t for n, t in model.state_dict().items() if n.removesuffix(".weight") not in made and n != "lm_head.weight"
    }
    return kept | {f"{module}.{leaf}": t for module, parts in made.items() for leaf, t in parts.items()}
