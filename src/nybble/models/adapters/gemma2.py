"""Gemma 2 and the text part of Gemma 3: a norm before and after attention and MLP, each ``1 + weight``.

The norms after (``post_...``) write to the residual stream and can't be folded; ``post_attention_layernorm`` is one of
those here, not the MLP's norm as in llama.
"""

from __future__ import annotations

from nybble.models.adapter import ROTARY_QUERY_KEY, Adapter, LinearFold, NormFold

PART = Adapter(
    name="gemma2",
    model_types=("gemma2", "gemma3_text"),
    blocks="model.layers",
    embeddings=("model.embed_tokens",),
    final_norm="model.norm",
    head="lm_head",
    norm_folds=(
        NormFold(
            norm="input_layernorm", readers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), offset=1.0
        ),
        NormFold(norm="pre_feedforward_layernorm", readers=("mlp.gate_proj", "mlp.up_proj"), offset=1.0),
    ),
    linear_folds=(
        LinearFold(first="self_attn.v_proj", second="self_attn.o_proj", rows="value_heads", heads=True),
        LinearFold(first="mlp.up_proj", second="mlp.down_proj", gates=("mlp.gate_proj",)),
    ),
    query_key_folds=(ROTARY_QUERY_KEY,),
)
