"""Tiny models of several families, quantized into folders once a run."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tests.tiny import save_text, save_tiny
from transformers import BertConfig, BertForSequenceClassification, ResNetConfig, ResNetForImageClassification

from nybble.pipelines.quantize import quantize

SIZES = {"hidden_size": 64, "intermediate_size": 96}
_ROOM = TemporaryDirectory(prefix="nybble-export-")


@cache
def text() -> str:
    return str(save_text(Path(_ROOM.name, "text.txt")))


def _bert() -> Any:
    sizes: dict[str, Any] = {**SIZES, "vocab_size": 300, "num_hidden_layers": 2, "max_position_embeddings": 64}
    return BertForSequenceClassification(BertConfig(num_attention_heads=4, **sizes))


def _resnet() -> Any:
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "image_size": 32}
    made = ResNetForImageClassification(ResNetConfig(**sizes, num_labels=5))  # type: ignore[call-arg]
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            values = {"running_mean": (-1, 1), "running_var": (0.5, 2), "weight": (0.5, 2), "bias": (-1, 1)}
            for name, (low, high) in values.items():
                getattr(module, name).data.uniform_(low, high)
    return made


@cache
def model(family: str = "llama") -> Path:
    """A float folder."""
    folder = Path(_ROOM.name, f"float-{family}")
    if family in ("bert", "resnet"):
        torch.manual_seed(1)
        (_bert() if family == "bert" else _resnet()).save_pretrained(folder)
        return folder
    changes: dict[str, Any] = {} if family == "gpt2" else dict(SIZES)
    if family == "qwen3_moe":
        changes["moe_intermediate_size"] = 32
    return save_tiny(folder, family, **changes)


@cache
def quantized(family: str = "llama", recipe: str = "rtn", calibrated: bool = False, **changes: Any) -> Path:
    """A folder that nybble wrote."""
    number = quantized.cache_info().currsize
    folder = Path(_ROOM.name, f"{family}-{number}")
    data: dict[str, Any] = {"data": text(), "settings": {"seq_len": 32, "samples": 4}} if calibrated else {}
    if family == "resnet":
        data = {"data": torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
    quantize(str(model(family)), recipe, out=folder, **data, **changes)
    return folder
