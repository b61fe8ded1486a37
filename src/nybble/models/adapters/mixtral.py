"""Mixtral: llama's attention, and a router over experts whose weights are fused in 3-D parameters."""

from __future__ import annotations

from nybble.models.adapter import ROTARY_QUERY_KEY, Adapter, LinearFold, NormFold

PART = Adapter(
    name="mixtral",
    model_types=("mixtral",),
    blocks="model.layers",
    embeddings=("model.embed_tokens",),
    final_norm="model.norm",
    head="lm_head",
    norm_folds=(
        NormFold(norm="input_layernorm", readers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        NormFold(norm="post_attention_layernorm", readers=("mlp.gate", "mlp.experts.gate_up_proj")),
    ),
    linear_folds=(LinearFold(first="self_attn.v_proj", second="self_attn.o_proj", rows="value_heads", heads=True),),
    query_key_folds=(ROTARY_QUERY_KEY,),
    writers=("self_attn.o_proj", "mlp.experts.down_proj"),
    experts="mlp.experts",
    limits=("up -> down of each expert is not offered as a fold: both halves are rows of one 3-D gate_up_proj",),
)
