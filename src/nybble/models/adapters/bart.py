"""BART: an encoder and a decoder whose layer norms stand after the residual sums."""

from __future__ import annotations

from nybble.models.adapter import Adapter, LinearFold, QueryKeyFold

PART = Adapter(
    name="bart",
    model_types=("bart", "marian"),
    blocks="{base}encoder.layers",
    decoder_blocks="{base}decoder.layers",
    embeddings=("{base}shared", "{base}encoder.embed_positions", "{base}decoder.embed_positions"),
    final_norm=None,
    head="lm_head",
    reads="pairs",
    linear_folds=(
        LinearFold(first="self_attn.v_proj", second="self_attn.out_proj", heads=True),
        LinearFold(first="encoder_attn.v_proj", second="encoder_attn.out_proj", heads=True),
    ),
    query_key_folds=(
        QueryKeyFold(query="self_attn.q_proj", key="self_attn.k_proj"),
        QueryKeyFold(query="encoder_attn.q_proj", key="encoder_attn.k_proj"),
    ),
    limits=(
        "norms can't be folded into linears: their outputs are also the next residual (post-norm)",
        "fc1 -> fc2 can't be folded: GELU between them is not homogeneous",
    ),
)
