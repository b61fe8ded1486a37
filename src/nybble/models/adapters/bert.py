"""BERT and its relatives: attention and MLP, each followed by a layer norm over the sum with its input.

The norms stand *after* the residual sum, so their outputs go to the next residual too and can't be folded into what
reads them.
"""

from __future__ import annotations

from nybble.models.adapter import Adapter, LinearFold, QueryKeyFold

PART = Adapter(
    name="bert",
    model_types=("bert", "roberta", "xlm-roberta", "camembert", "electra"),
    blocks="{base}encoder.layer",
    embeddings=("{base}embeddings.word_embeddings", "{base}embeddings.position_embeddings"),
    final_norm=None,
    head=None,
    reads="sentences",
    linear_folds=(LinearFold(first="attention.self.value", second="attention.output.dense", heads=True),),
    query_key_folds=(QueryKeyFold(query="attention.self.query", key="attention.self.key"),),
    limits=(
        "norms can't be folded into linears: their outputs are also the next residual (post-norm)",
        "intermediate.dense -> output.dense can't be folded: GELU between them is not homogeneous",
    ),
)
