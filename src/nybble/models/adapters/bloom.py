"""BLOOM: a norm on the embeddings, ALiBi positions, q/k/v fused head by head, GELU."""

from __future__ import annotations

from nybble.models.adapter import Adapter, LinearFold, NormFold, QueryKeyFold

# With this set the residual stream starts from the norm's output, so its factors can't move into the linear alone.
PLAIN_RESIDUAL = (("apply_residual_connection_post_layernorm", False),)

PART = Adapter(
    name="bloom",
    model_types=("bloom",),
    blocks="transformer.h",
    embeddings=("transformer.word_embeddings",),
    final_norm="transformer.ln_f",
    head="lm_head",
    norm_folds=(
        NormFold(norm="input_layernorm", readers=("self_attention.query_key_value",), when=PLAIN_RESIDUAL),
        NormFold(norm="post_attention_layernorm", readers=("mlp.dense_h_to_4h",), when=PLAIN_RESIDUAL),
    ),
    linear_folds=(
        LinearFold(
            first="self_attention.query_key_value", second="self_attention.dense", rows="third_of_each_head", heads=True
        ),
    ),
    query_key_folds=(
        QueryKeyFold(
            query="self_attention.query_key_value", key="self_attention.query_key_value", rows="third_of_each_head"
        ),
    ),
    limits=("mlp.dense_h_to_4h -> mlp.dense_4h_to_h can't be folded: GELU between them is not homogeneous",),
)
