"""Prompts as a denoiser reads them: through the tokenizer and the text encoder of its pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble.core.errors import DataError, FileError, ModelError, UsageError
from nybble.core.guard import reading
from nybble.models.pipeline_parts import Parts

ENCODER, TOKENIZER = "text_encoder", "tokenizer"


def read_prompts(path: Path) -> list[str]:
    """A file's lines that aren't empty.

    Raises:
        FileError: it can't be read. DataError: nothing is in it.
    """
    if not path.is_file():
        raise FileError(f"there is no {path}; prompts are a text file, one a line.")
    with reading(path):
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    found = [line for line in lines if line]
    if not found:
        raise DataError(f"{path} holds no prompt: every line is empty.")
    return found


def prompt_conditions(path: Path, parts: Parts, model: Any) -> Callable[[int], dict[str, Tensor]]:
    """What gives conditions for so many images: the file's prompts in order, from the start again when they end."""
    prompts = read_prompts(path)

    def conditions(count: int) -> dict[str, Tensor]:
        return encoded([prompts[number % len(prompts)] for number in range(count)], parts, model)

    return conditions


@torch.no_grad()
def encoded(prompts: list[str], parts: Parts, model: Any) -> dict[str, Tensor]:
    """States of prompts: ``encoder_hidden_states`` float32 [prompts, tokens, width], and which tokens are real.

    Args:
        prompts: any texts.
        parts: of the pipeline.
        model: the denoiser that reads them.

    Raises:
        UsageError: the pipeline has no text encoder. ModelError: one that can't be read, or whose width is another.
    """
    if not {ENCODER, TOKENIZER} <= parts.classes.keys():
        raise UsageError(
            f"prompts are given, and {parts.folder} has no {ENCODER} and {TOKENIZER} to read them; its images are of "
            "classes, or of anything."
        )
    if "encoder_hidden_states_t5" in model.takes:
        raise UsageError(
            f"{model.config.denoiser} reads two text encoders, which is not done here; give their states as data."
        )
    from transformers import AutoTokenizer

    with reading(f"the text encoder of {parts.folder}", ModelError):
        tokenizer = AutoTokenizer.from_pretrained(str(parts.folder / TOKENIZER), local_files_only=True)
        encoder = _encoder(parts)
        longest = min(int(tokenizer.model_max_length), 256)
        tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=longest, return_tensors="pt")
        asked = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
        states = encoder(**asked).last_hidden_state.float()
    found = {"encoder_hidden_states": states}
    if "encoder_attention_mask" in model.takes:
        found["encoder_attention_mask"] = tokens["attention_mask"]
    return found


def _encoder(parts: Parts) -> Any:
    """The pipeline's text encoder, in float32 on the CPU; no code of the folder runs."""
    import transformers

    package, name = parts.classes[ENCODER]
    cls = getattr(transformers, name, None) if package == "transformers" else None
    if cls is None:
        raise ModelError(f"{parts.folder}: its {ENCODER} is {package}.{name}, which is no class of transformers.")
    return cls.from_pretrained(
        str(parts.folder / ENCODER), dtype=torch.float32, local_files_only=True, use_safetensors=True
    ).eval()
