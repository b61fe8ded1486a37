"""BERT with widths of its layers' own (:mod:`nybble.models.own.bottleneck`)."""

from __future__ import annotations

from nybble.models.adapter import Adapter, LinearFold, QueryKeyFold

PART = Adapter(
    name="bottleneck",
    model_types=("nybble-bottleneck",),
    blocks="{base}encoder.layer",
    embeddings=("{base}embeddings.word_embeddings", "{base}embeddings.position_embeddings"),
    final_norm=None,
    head=None,
    reads="sentences",
    linear_folds=(LinearFold(first="layer.attention.self.value", second="layer.attention.output.dense", heads=True),),
    query_key_folds=(QueryKeyFold(query="layer.attention.self.query", key="layer.attention.self.key"),),
    limits=(
        "norms can't be folded into linears: their outputs are also the next residual (post-norm)",
        "intermediate.dense -> output.dense can't be folded: GELU between them is not homogeneous",
    ),
)
