"""What llama.cpp calls things: GGUF architecture -> transformers config and tensor names, as one table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from nybble.core.errors import ModelError, did_you_mean
from nybble.models.sources.gguf_rope import Factors, number, rope_parameters

SHAPE_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
HEADS = {"attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim"}
WINDOW = {"attention.sliding_window": "sliding_window"}
OWN_HEADS = ("qwen3", "gemma2", "gemma3_text")
"""Config classes whose default width of a head doesn't follow from the other sizes."""
SOFTCAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
WHOLE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
}
PRE_NORM = BLOCK | {"ffn_norm": "post_attention_layernorm"}
QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
SANDWICH = BLOCK | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True, kw_only=True)
class GgufArch:
    """How one GGUF architecture reads as a transformers model.

    ``keys``: metadata key without the architecture -> config key. ``optional``: may be absent; then the config class's
    own default holds, which is llama.cpp's, but for heads (:func:`config_dict`). ``block``: tensor name
    within ``blk.N`` -> module within the block. ``rope_interleaved``: llama.cpp reorders the rows of q and k so that
    rotated pairs are neighbours; transformers keeps the halves apart. ``norm_offset``: what llama.cpp added to norm
    weights. ``odd_scale_blocks``: the block count of the one size whose queries are scaled by hidden size over
    heads, not by the head's width (the file doesn't say).
    """

    model_type: str
    architecture: str
    block: Mapping[str, str]
    keys: Mapping[str, str] = field(default_factory=lambda: SHAPE_KEYS)
    optional: Mapping[str, str] = field(default_factory=lambda: HEADS)
    rope_interleaved: bool = False
    norm_offset: float = 0.0
    odd_scale_blocks: int | None = None
    local_rope_theta: float | None = None


ARCHS = {
    "llama": GgufArch(
        model_type="llama", architecture="LlamaForCausalLM", block=PRE_NORM, rope_interleaved=True,
        optional={"rope.dimension_count": "head_dim"} | HEADS,
    ),
    "qwen2": GgufArch(
        model_type="qwen2", architecture="Qwen2ForCausalLM", block=PRE_NORM,
        optional={"attention.head_count_kv": "num_key_value_heads"},
    ),
    "qwen3": GgufArch(
        model_type="qwen3", architecture="Qwen3ForCausalLM", block=PRE_NORM | QK_NORM,
    ),
    "gemma2": GgufArch(
        model_type="gemma2", architecture="Gemma2ForCausalLM", block=SANDWICH,
        optional=HEADS | WINDOW | SOFTCAPS, norm_offset=1.0, odd_scale_blocks=46,
    ),
    "gemma3": GgufArch(
        model_type="gemma3_text", architecture="Gemma3ForCausalLM", block=SANDWICH | QK_NORM,
        optional=HEADS | WINDOW, norm_offset=1.0, odd_scale_blocks=62, local_rope_theta=10_000.0,
    ),
}  # fmt: skip


def arch_of(metadata: Mapping[str, Any], place: str) -> tuple[str, GgufArch]:
    """The file's architecture and its row of the table.

    Raises:
        ModelError: an architecture that has no row; the message lists those that have.
    """
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHS:
        raise ModelError(f"{place}: GGUF architecture {name!r} is unknown.{did_you_mean(str(name), ARCHS)}")
    return name, ARCHS[name]


def config_dict(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    name: str,
    arch: GgufArch,
    place: str,
    factors: Mapping[str, Factors] = MappingProxyType({}),
) -> dict[str, Any]:
    """What config.json would say, from the metadata, the tensors' shapes, and the rope's factors."""
    raw: dict[str, Any] = {"model_type": arch.model_type, "architectures": [arch.architecture]}
    for key, meaning in arch.keys.items():
        raw[meaning] = number(metadata, f"{name}.{key}", place)
    for key, meaning in arch.optional.items():
        if f"{name}.{key}" in metadata:
            raw[meaning] = number(metadata, f"{name}.{key}", place)
    raw.setdefault("num_key_value_heads", raw["num_attention_heads"])
    if arch.model_type in OWN_HEADS:
        raw.setdefault("head_dim", raw["hidden_size"] // max(raw["num_attention_heads"], 1))
    if arch.local_rope_theta is not None and not raw.get("sliding_window"):
        raw["layer_types"] = ["full_attention"] * raw["num_hidden_layers"]
    if arch.odd_scale_blocks is not None:
        odd = raw["num_hidden_layers"] == arch.odd_scale_blocks
        raw["query_pre_attn_scalar"] = (
            raw["hidden_size"] // max(raw["num_attention_heads"], 1) if odd else raw["head_dim"]
        )
    if "token_embd.weight" not in shapes:
        raise ModelError(f"{place} has no token_embd.weight.")
    raw["vocab_size"] = shapes["token_embd.weight"][0]
    rope = rope_parameters(metadata, f"{name}.rope", factors, raw, place)
    local = {"rope_type": "default", "rope_theta": arch.local_rope_theta}
    whole = arch.local_rope_theta is None
    raw["rope_parameters"] = rope if whole else {"full_attention": rope, "sliding_attention": local}
    raw["tie_word_embeddings"] = "output.weight" not in shapes
    if arch.model_type == "llama":
        raw["attention_bias"] = "blk.0.attn_q.bias" in shapes
    for token in ("bos", "eos", "padding"):
        token_id = metadata.get(f"tokenizer.ggml.{token}_token_id")
        raw["pad_token_id" if token == "padding" else f"{token}_token_id"] = token_id
    return raw


def module_name(tensor: str, arch: GgufArch) -> str | None:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``; None for a tensor without a meaning."""
    stem, _, kind = tensor.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    if stem in WHOLE:
        return f"{WHOLE[stem]}.{kind}"
    prefix, _, rest = stem.partition(".")
    number, _, part = rest.partition(".")
    if prefix != "blk" or not number.isdecimal() or part not in arch.block:
        return None
    return f"model.layers.{number}.{arch.block[part]}.{kind}"
