"""GPT-NeoX and Pythia: attention and MLP in parallel from two norms, q/k/v fused head by head, GELU."""

from __future__ import annotations

from nybble.models.adapter import Adapter, LinearFold, NormFold, QueryKeyFold

PART = Adapter(
    name="gpt-neox",
    model_types=("gpt_neox",),
    blocks="gpt_neox.layers",
    embeddings=("gpt_neox.embed_in",),
    final_norm="gpt_neox.final_layer_norm",
    head="lm_head",
    norm_folds=(
        NormFold(norm="input_layernorm", readers=("attention.query_key_value",)),
        NormFold(norm="post_attention_layernorm", readers=("mlp.dense_h_to_4h",)),
    ),
    linear_folds=(
        LinearFold(first="attention.query_key_value", second="attention.dense", rows="third_of_each_head", heads=True),
    ),
    query_key_folds=(
        QueryKeyFold(
            query="attention.query_key_value", key="attention.query_key_value", rows="third_of_each_head", rotary=True
        ),
    ),
    renames=(("embed_out.", "lm_head."),),
    limits=("mlp.dense_h_to_4h -> mlp.dense_4h_to_h can't be folded: GELU between them is not homogeneous",),
)
