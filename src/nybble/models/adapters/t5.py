"""T5: RMS norms before attention and MLP; the first block's attention bias serves all blocks."""

from __future__ import annotations

from nybble.models.adapter import Adapter, Flow, LinearFold, NormFold, QueryKeyFold

PLAIN_RELU = (("dense_act_fn", "relu"), ("is_gated_act", False))
GATED = (("is_gated_act", True),)

PART = Adapter(
    name="t5",
    model_types=("t5", "mt5"),
    blocks="{base}encoder.block",
    decoder_blocks="{base}decoder.block",
    embeddings=("{base}shared",),
    final_norm="{base}decoder.final_layer_norm",
    head="lm_head",
    reads="pairs",
    norm_folds=(
        NormFold(norm="layer.0.layer_norm", readers=tuple(f"layer.0.SelfAttention.{part}" for part in "qkv")),
        NormFold(norm="layer.1.layer_norm", readers=("layer.1.EncDecAttention.q",)),
        NormFold(norm="layer.1.layer_norm", readers=("layer.1.DenseReluDense.wi",)),
        NormFold(norm="layer.1.layer_norm", readers=("layer.1.DenseReluDense.wi_0", "layer.1.DenseReluDense.wi_1")),
        NormFold(norm="layer.2.layer_norm", readers=("layer.2.DenseReluDense.wi",)),
        NormFold(norm="layer.2.layer_norm", readers=("layer.2.DenseReluDense.wi_0", "layer.2.DenseReluDense.wi_1")),
    ),
    linear_folds=(
        LinearFold(first="layer.0.SelfAttention.v", second="layer.0.SelfAttention.o", heads=True),
        LinearFold(first="layer.1.EncDecAttention.v", second="layer.1.EncDecAttention.o", heads=True),
        *(
            LinearFold(
                first=f"layer.{n}.DenseReluDense.{first}",
                second=f"layer.{n}.DenseReluDense.wo",
                when=when,
                gates=tuple(f"layer.{n}.DenseReluDense.{gate}" for gate in gates),
            )
            for n in (1, 2)
            for first, gates, when in (("wi", (), PLAIN_RELU), ("wi_1", ("wi_0",), GATED))
        ),
    ),
    query_key_folds=(
        QueryKeyFold(query="layer.0.SelfAttention.q", key="layer.0.SelfAttention.k"),
        QueryKeyFold(query="layer.1.EncDecAttention.q", key="layer.1.EncDecAttention.k"),
    ),
    flows=(
        Flow(name="position_bias", gives=1, takes=1, once=True),
        Flow(name="cross_position_bias", gives=2, takes=4, once=True),
    ),
)
