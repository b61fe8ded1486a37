"""Qwen 2 and 3 mixture of experts: some blocks dense, some sparse; Qwen 2's sparse blocks have a shared expert too."""

from __future__ import annotations

from nybble.models.adapter import ROTARY_QUERY_KEY, Adapter, LinearFold, NormFold

ROUTED = ("mlp.gate", "mlp.experts.gate_up_proj")
SHARED = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert_gate")

PART = Adapter(
    name="qwen-moe",
    model_types=("qwen2_moe", "qwen3_moe"),
    blocks="model.layers",
    embeddings=("model.embed_tokens",),
    final_norm="model.norm",
    head="lm_head",
    norm_folds=(
        NormFold(norm="input_layernorm", readers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        NormFold(norm="post_attention_layernorm", readers=("mlp.gate_proj", "mlp.up_proj")),
        NormFold(norm="post_attention_layernorm", readers=(*ROUTED, *SHARED), when=(("model_type", "qwen2_moe"),)),
        NormFold(norm="post_attention_layernorm", readers=ROUTED, when=(("model_type", "qwen3_moe"),)),
    ),
    linear_folds=(
        LinearFold(first="self_attn.v_proj", second="self_attn.o_proj", rows="value_heads", heads=True),
        LinearFold(first="mlp.up_proj", second="mlp.down_proj", gates=("mlp.gate_proj",)),
        LinearFold(
            first="mlp.shared_expert.up_proj",
            second="mlp.shared_expert.down_proj",
            gates=("mlp.shared_expert.gate_proj",),
        ),
    ),
    query_key_folds=(ROTARY_QUERY_KEY,),
    writers=("self_attn.o_proj", "mlp.down_proj", "mlp.experts.down_proj", "mlp.shared_expert.down_proj"),
    experts="mlp.experts",
    limits=("up -> down of each expert is not offered as a fold: both halves are rows of one 3-D gate_up_proj",),
)
