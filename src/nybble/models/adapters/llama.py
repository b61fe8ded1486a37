"""Llama and its relatives: RMS norm before attention and MLP, separate q/k/v, gated MLP (SmolLM is a llama)."""

from __future__ import annotations

from nybble.models.adapter import ROTARY_QUERY_KEY, Adapter, LinearFold, NormFold

PART = Adapter(
    name="llama",
    model_types=("llama", "mistral", "qwen2", "qwen3", "smollm3"),
    blocks="model.layers",
    embeddings=("model.embed_tokens",),
    final_norm="model.norm",
    head="lm_head",
    norm_folds=(
        NormFold(norm="input_layernorm", readers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        NormFold(norm="post_attention_layernorm", readers=("mlp.gate_proj", "mlp.up_proj")),
    ),
    linear_folds=(
        LinearFold(first="self_attn.v_proj", second="self_attn.o_proj", rows="value_heads", heads=True),
        # down reads act(gate) * up: linear in up.
        LinearFold(first="mlp.up_proj", second="mlp.down_proj", gates=("mlp.gate_proj",)),
    ),
    query_key_folds=(ROTARY_QUERY_KEY,),
    writers=("self_attn.o_proj", "mlp.down_proj"),
)
