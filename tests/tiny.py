"""Tiny random models of every family, saved to folders with a tokenizer, and text for them."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from nybble.nn.kv_model import cache_argument
from nybble.recipe import Recipe

WORDS = ["<unk>", "<s>", "</s>", *(a + b for a in "bcdfghklmn" for b in "aeiou")]  # 53 tokens
SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {
    "vocab_size": 300,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {**SIZES, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6}
MOE = {**SIZES, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "tie_word_embeddings": True, "attention_bias": True},
    "mistral": {**SIZES, "sliding_window": 6},
    "qwen2": {**SIZES, "tie_word_embeddings": True},
    "qwen3": {**SIZES, "head_dim": 16},
    "smollm3": {**SIZES, "no_rope_layers": [1, 0]},
    "gemma2": GEMMA,
    "gemma3_text": {**GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
    "opt": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": GPT2,
    "gpt_neox": SIZES,
    "bloom": {"vocab_size": 300, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mixtral": {**MOE, "num_local_experts": 4},
    "qwen3_moe": {**MOE, "num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8},
    "falcon": {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},  # no adapter
}  # fmt: skip
MOES = ("mixtral", "qwen3_moe")


def tiny_model(family: str = "llama", dtype: torch.dtype = torch.bfloat16, seed: int = 3, **changes: Any) -> Any:
    """A model with weights large enough that its logits tell wrong numbers from right ones."""
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **changes})
    auto: Any = AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config, dtype=dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(8)
    return model


def tiny_tokenizer() -> Any:
    """A token a word of WORDS."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    make: Any = PreTrainedTokenizerFast
    return make(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def framed_tokenizer() -> Any:
    """Puts <s> before and </s> behind every text, and a second text behind that, of another type."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


class TwoLanguages(PreTrainedTokenizerFast):
    """Targets end in another token than inputs."""

    def _frame(self, end: str, number: int) -> None:
        self.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", pair=f"$A $B {end}", special_tokens=[(end, number)]
        )

    def _switch_to_input_mode(self) -> None:
        self._frame("</s>", 2)

    def _switch_to_target_mode(self) -> None:
        self._frame("<s>", 1)


def two_language_tokenizer() -> Any:
    """Puts </s> behind an input and <s> behind a target."""
    make: Any = TwoLanguages
    tokenizer = make(tokenizer_object=tiny_tokenizer().backend_tokenizer, unk_token="<unk>", pad_token="<unk>")
    tokenizer._switch_to_input_mode()
    return tokenizer


def save_tiny(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A model and its tokenizer in ``folder``."""
    tiny_model(family, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def shortened(recipe: Recipe, steps: int = 2) -> Recipe:
    """With few steps of training: more of them say nothing about how a recipe's parts work together."""
    few = [
        replace(step, options={**step.options, "steps": min(steps, step.options["steps"])})
        if "steps" in step.options
        else step
        for step in recipe.steps
    ]
    return replace(recipe, steps=tuple(few))


def save_text(path: Path, words: int = 1200) -> Path:
    """A text of random words."""
    path.write_text(" ".join(random.Random(0).choices(WORDS[3:], k=words)))
    return path


def input_ids() -> torch.Tensor:
    """Two sequences of twelve tokens."""
    return torch.randint(3, len(WORDS), (2, 12), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """What a model says to :func:`input_ids`."""
    found: torch.Tensor = model(input_ids=input_ids(), use_cache=False).logits
    return found


def given(model: Any, cache: Any) -> dict[str, Any]:
    """A cache under the name that the model's forward has for it; transformers 5.24 changed it."""
    return {cache_argument(type(model)): cache}


def linear_names(model: nn.Module, blocks: str) -> set[str]:
    """Modules with a matrix inside the blocks: transformers and torch know no other layers of language models."""
    return {
        name
        for name, module in model.named_modules()
        if name.startswith(f"{blocks}.") and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
    }
