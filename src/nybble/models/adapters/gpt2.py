"""GPT-2: layer norms before, one Conv1D (weight ``[in, out]``) for q, k and v side by side, GELU."""

from __future__ import annotations

from nybble.models.adapter import Adapter, LinearFold, NormFold, QueryKeyFold

PART = Adapter(
    name="gpt2",
    model_types=("gpt2",),
    blocks="transformer.h",
    embeddings=("transformer.wte", "transformer.wpe"),
    final_norm="transformer.ln_f",
    head="lm_head",
    norm_folds=(
        NormFold(norm="ln_1", readers=("attn.c_attn",)),
        NormFold(norm="ln_2", readers=("mlp.c_fc",)),
    ),
    linear_folds=(LinearFold(first="attn.c_attn", second="attn.c_proj", rows="last_third", heads=True),),
    query_key_folds=(QueryKeyFold(query="attn.c_attn", key="attn.c_attn", rows="last_third"),),
    limits=("mlp.c_fc -> mlp.c_proj can't be folded: GELU between them is not homogeneous",),
)
