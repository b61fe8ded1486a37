"""Tiny random models of every family that has an adapter, and of one that has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

LLAMA_LIKE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MOE = {**LLAMA_LIKE, "num_experts_per_tok": 2}
GEMMA = {**LLAMA_LIKE, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6}
BLOOM = {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA_LIKE, "tie_word_embeddings": True, "attention_bias": True},
    "mistral": {**LLAMA_LIKE, "sliding_window": 6},
    "qwen2": LLAMA_LIKE,
    "qwen3": {**LLAMA_LIKE, "head_dim": 16},
    "smollm3": {**LLAMA_LIKE, "no_rope_layers": [1, 0]},
    "gemma": {**LLAMA_LIKE, "head_dim": 8},
    "gemma2": GEMMA,
    "gemma3_text": {**GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
    "opt": {
        "vocab_size": 96, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64, "word_embed_proj_dim": 32,
    },
    "gpt2": {
        "vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_neox": {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64,
    },
    "bloom": BLOOM,
    "mixtral": {**MOE, "num_local_experts": 4},
    "qwen2_moe": {
        **MOE, "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
        "mlp_only_layers": [0],
    },
    "qwen3_moe": {**MOE, "num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Each family's model type."""
    return str(request.param)


@pytest.fixture
def make_model() -> Callable[..., Any]:
    """Build the tiny random model of a family; norm gains are multiples of 1/64, so that halving them is exact."""

    def make(family: str, **changes: Any) -> Any:
        from transformers import AutoConfig, AutoModelForCausalLM

        auto: Any = AutoModelForCausalLM
        config = AutoConfig.for_model(family, **{**FAMILIES[family], **changes})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            model = auto.from_config(config, **({"attn_implementation": "eager"} if family == "gemma2" else {})).eval()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "norm" in name or ".ln_" in name:
                        parameter.add_(torch.randint(-16, 17, parameter.shape) / 64)
                    elif parameter.ndim == 1:
                        parameter.normal_(std=0.1)
                    elif parameter.ndim > 1:
                        parameter.mul_(10)
        return model

    return make


@pytest.fixture
def input_ids() -> torch.Tensor:
    """Two sequences of nine tokens."""
    return torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def all_linears() -> Callable[[nn.Module], set[str]]:
    """Names of the modules with a matmul weight in a block, by an independent look at their classes."""

    def find(block: nn.Module) -> set[str]:
        found = {n for n, m in block.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
        return found | {n for n, m in block.named_modules() if type(m).__name__.endswith("Experts")}

    return find
