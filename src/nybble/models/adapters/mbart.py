"""mBART, Pegasus, M2M-100 and NLLB: BART with its norms before attention and MLP.

The decoder's cross-attention takes its queries from a norm, its keys and values from the encoder, whose final norm all
decoder blocks read: only the queries' pair folds inside a block.
"""

from __future__ import annotations

from nybble.models.adapter import Adapter, LinearFold, NormFold, QueryKeyFold

PART = Adapter(
    name="mbart",
    model_types=("mbart", "pegasus", "m2m_100"),
    blocks="{base}encoder.layers",
    decoder_blocks="{base}decoder.layers",
    embeddings=("{base}shared",),
    final_norm="{base}decoder.layer_norm",
    head="lm_head",
    reads="pairs",
    norm_folds=(
        NormFold(norm="self_attn_layer_norm", readers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        NormFold(norm="encoder_attn_layer_norm", readers=("encoder_attn.q_proj",)),
        NormFold(norm="final_layer_norm", readers=("fc1",)),
    ),
    linear_folds=(
        LinearFold(first="self_attn.v_proj", second="self_attn.out_proj", heads=True),
        LinearFold(first="encoder_attn.v_proj", second="encoder_attn.out_proj", heads=True),
    ),
    query_key_folds=(
        QueryKeyFold(query="self_attn.q_proj", key="self_attn.k_proj"),
        QueryKeyFold(query="encoder_attn.q_proj", key="encoder_attn.k_proj"),
    ),
    limits=("fc1 -> fc2 can't be folded: GELU or ReLU between them, and a fold pair must hold for every config",),
)
