"""OPT: layer norm before attention and MLP (after, in the 350M model), ReLU between fc1 and fc2."""

from __future__ import annotations

from nybble.models.adapter import Adapter, LinearFold, NormFold, QueryKeyFold

# After-norms also feed the residual stream, so their factors can't move into the linears alone.
PRE_NORM = (("do_layer_norm_before", True),)

PART = Adapter(
    name="opt",
    model_types=("opt",),
    blocks="model.decoder.layers",
    embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    final_norm="model.decoder.final_layer_norm",
    head="lm_head",
    norm_folds=(
        NormFold(
            norm="self_attn_layer_norm",
            readers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            when=PRE_NORM,
        ),
        NormFold(norm="final_layer_norm", readers=("fc1",), when=PRE_NORM),
    ),
    linear_folds=(
        LinearFold(first="self_attn.v_proj", second="self_attn.out_proj", heads=True),
        # relu(s * x) = s * relu(x) for s > 0.
        LinearFold(first="fc1", second="fc2", when=(("activation_function", "relu"),)),
    ),
    query_key_folds=(QueryKeyFold(query="self_attn.q_proj", key="self_attn.k_proj"),),
)
