"""The attention implementation ``nybble``: with nothing quantized it is every family's own eager attention."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from tests.tiny import FAMILIES, GPT2, MOE, SIZES, input_ids
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from nybble.core.errors import ModelError
from nybble.matmul_format import OPERANDS
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.attention import (
    PART,
    MatmulQuantizers,
    OperandWatch,
    attentions,
    quantized_attention,
    use_quantized_attention,
)
from nybble.quantizer import Quantizer

HEADS = {**SIZES, "head_dim": 8}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
SPARSE = {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 16}
EXPERTS = {
    "n_routed_experts": 4,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
UNUSUAL: dict[str, dict[str, Any]] = {
    "gpt_oss": {**HEADS, **MOE, "num_local_experts": 4, "sliding_window": 6},  # s_aux: a sink for each head
    "granite_swa": {**HEADS, "sliding_window": 6},  # the same, on the output
    "mimo_v2_flash": {**HEADS, **MOE, **EXPERTS, "v_head_dim": 8, "sliding_window": 6},  # sinks in some layers
    "flint": {**HEADS, "sliding_window": 6},
    "inkling2_text": {**HEADS, **MOE, "sliding_window": 6},  # sinks and position_bias
    "vaultgemma": {**HEADS, "query_pre_attn_scalar": 8, "sliding_window": 6},  # softcap
    "modernbert-decoder": {**SIZES, "num_key_value_heads": 4},  # deterministic
    "stablelm": SIZES,  # position_ids
    "whisper": {**SIZES, "decoder_layers": 2, "d_model": 32, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},
}
UNUSUAL = {family: sizes for family, sizes in UNUSUAL.items() if family in CONFIG_MAPPING}  # of this transformers
WITHOUT = ("bloom", "falcon")  # attention that calls no interface


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make(family: str, dtype: torch.dtype, **changes: Any) -> Any:
    """A tiny eager model whose every parameter matters."""
    config = AutoConfig.for_model(family, **{**FAMILIES.get(family, {}), **UNUSUAL.get(family, {}), **changes})
    auto: Any = AutoModelForCausalLM
    return stir(auto.from_config(config, dtype=dtype, attn_implementation="eager"))


def stir(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fresh = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(0.16 * fresh)
            elif "sink" in name:
                parameter.copy_(fresh)
    return model.eval()


def note(seen: set[str], operand: str, _: Tensor) -> None:
    seen.add(operand)


@torch.no_grad()
def answer(model: Any) -> Tensor:
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :3] = 0  # padded on the left
    found: Tensor = model(input_ids=input_ids(), attention_mask=mask, use_cache=False).logits
    return found


def test_enough_families_are_here() -> None:
    assert len(UNUSUAL) >= 6 and "gpt_oss" in UNUSUAL


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", [*(f for f in FAMILIES if f not in WITHOUT), *UNUSUAL])
def test_with_nothing_quantized_it_is_eager(family: str, dtype: torch.dtype) -> None:
    if family == "inkling2_text" and dtype == torch.bfloat16:
        return  # its router is in float32 only where a checkpoint is loaded
    model = make(family, dtype)
    expected = answer(model)
    assert torch.isfinite(expected).all() and expected.std() > 0.01
    use_quantized_attention(model)
    assert model.config._attn_implementation == "nybble"
    assert torch.equal(answer(model), expected)

    seen: dict[str, set[str]] = {}
    for name, module in list(attentions(model)):
        module.add_module(PART, OperandWatch(partial(note, seen.setdefault(name, set()))))
    assert torch.equal(answer(model), expected)  # shown, not changed
    called = [operands for operands in seen.values() if operands]  # no encoder, no cross-attention
    assert len(called) >= 2 and all(operands == set(OPERANDS) for operands in called)


@pytest.mark.parametrize("family", ["llama", *UNUSUAL])
def test_every_operand_is_rounded(family: str) -> None:
    """Each operand by itself changes the result, so each is really used rounded."""
    model = make(family, torch.float32)
    use_quantized_attention(model)
    plain = answer(model)
    for rounded in OPERANDS:
        for _, module in list(attentions(model)):
            module.add_module(PART, Only(rounded))
        assert not torch.equal(answer(model), plain), rounded


class Only(nn.Module):
    """Rounds one operand to few bits."""

    def __init__(self, operand: str) -> None:
        super().__init__()
        self.operand, self.quantizer = operand, Quantizer("float4_e2m1fn tensor")

    def forward(self, name: str, x: Tensor) -> Tensor:
        return self.quantizer.fake_quantize(x) if name == self.operand else x


def test_sinks_by_the_formula() -> None:
    """gpt_oss: a logit more in every row's softmax, without a value; operands rounded before each product."""
    model = make("gpt_oss", torch.float32)
    use_quantized_attention(model)
    attention = model.model.layers[1].self_attn
    quantizer = Quantizer("int8 tensor")
    attention.add_module(PART, MatmulQuantizers({name: ActivationQuantizer(quantizer) for name in OPERANDS}))
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 5, 8, generator=generator)
    key, value = (torch.randn(2, 2, 5, 8, generator=generator) for _ in range(2))
    mask = torch.full((5, 5), float("-inf")).triu(1)
    with torch.no_grad():
        found, probabilities = quantized_attention(
            attention, query, key, value, mask, scaling=0.5, dropout=0.0, s_aux=attention.sinks
        )
    q, k, v = (quantizer.fake_quantize(x).double() for x in (query, key, value))
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = q @ k.mT * 0.5 + mask
    weights = scores.exp() / (
        scores.exp().sum(-1, keepdim=True) + attention.sinks.detach().double().exp()[:, None, None]
    )
    assert probabilities is not None
    assert torch.allclose(probabilities.double(), weights, atol=1e-6)  # float32's rounding of numbers up to 1
    expected = (quantizer.fake_quantize(probabilities).double() @ v).transpose(1, 2)
    assert torch.allclose(found.double(), expected, atol=1e-5)


def test_position_bias_of_t5() -> None:
    # From the configuration: set_attn_implementation of transformers 5.17 doesn't reach T5's stacks.
    eager: Any = {"attn_implementation": "eager"}
    config = T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, **eager)
    model: Any = stir(T5ForConditionalGeneration(config))
    given = {"input_ids": input_ids(), "decoder_input_ids": input_ids()[:, :5]}
    with torch.no_grad():
        expected = model(**given).logits
        use_quantized_attention(model)
        assert torch.equal(model(**given).logits, expected)


@pytest.mark.parametrize("family", WITHOUT)
def test_attention_that_calls_no_interface(family: str) -> None:
    with pytest.raises(ModelError, match=r"no attention whose products can be quantized"):
        use_quantized_attention(make(family, torch.float32))


def test_arguments_that_eager_does_not_know() -> None:
    if "hy_v4" not in CONFIG_MAPPING:
        pytest.skip("this transformers has no attention over chosen keys")
    model = make("hy_v4", torch.float32, **(HEADS | MOE | EXPERTS | LATENT | SPARSE))
    use_quantized_attention(model)
    with pytest.raises(ModelError, match=r"HYV4Attention hands indices to its attention.*Leave matmuls out"):
        answer(model)

    llama = make("llama", torch.float32)
    use_quantized_attention(llama)
    attention, x = llama.model.layers[0].self_attn, torch.ones(1, 4, 3, 8)
    with pytest.raises(ModelError, match="LlamaAttention hands s_aux to its attention"):
        quantized_attention(attention, x, x[:, :2], x[:, :2], None, scaling=1.0, s_aux=torch.ones(4))
    found, _ = quantized_attention(attention, x, x[:, :2], x[:, :2], None, scaling=1.0, s_aux=None, sliding_window=6)
    assert torch.equal(found, torch.ones(1, 3, 4, 8))


def test_gpt2_that_computes_its_attention_apart() -> None:
    model = make("gpt2", torch.float32, **GPT2, reorder_and_upcast_attn=True)
    use_quantized_attention(model)
    with pytest.raises(ModelError, match="GPT2Attention with reorder_and_upcast_attn=True"):
        answer(model)


def eager_attention_forward(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Any:
    return torch.einsum("bhqk,bhkd->bqhd", query @ key.mT, value), None


class Unlike(nn.Module):
    """An attention whose products can't be told apart."""

    def forward(self, x: Tensor) -> Any:
        assert eager_attention_forward is not None
        return quantized_attention(self, x, x, x, None)


def eager_with_a_third_product(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Any:
    return ((query @ key.mT) @ value) @ torch.eye(2), None


def eager_with_another_product(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Any:
    return torch.einsum("bhqk,bhkd->bqhd", query @ key.mT, value @ torch.eye(2)), None


class Third(nn.Module):
    def forward(self, x: Tensor) -> Any:
        assert eager_with_a_third_product is not None
        return quantized_attention(self, x, x, x, None)


class Another(nn.Module):
    def forward(self, x: Tensor) -> Any:
        assert eager_with_another_product is not None
        return quantized_attention(self, x, x, x, None)


class Several(nn.Module):
    def forward(self, x: Tensor) -> Any:
        assert eager_with_a_third_product is not eager_with_another_product
        return quantized_attention(self, x, x, x, None)


class Bare(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return quantized_attention(self, x, x, x, None)


def test_attention_of_another_make() -> None:
    x = torch.ones(1, 1, 3, 2)
    for made in (Unlike, Third, Another):
        module = made()
        assert module(x)[0].numel() == 6
        module.add_module(PART, Only("value"))
        with pytest.raises(ModelError, match=rf"{made.__name__} doesn't multiply queries by keys and then probabili"):
            module(x)
    for without in (Bare, Several):
        with pytest.raises(ModelError, match=f"{without.__name__} hands no eager attention of its own"):
            without()(x)
