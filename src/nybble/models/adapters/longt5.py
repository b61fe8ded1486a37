"""LongT5: T5 with local or transient-global attention in the encoder, and blocks that return attention weights too."""

from __future__ import annotations

from dataclasses import replace

from nybble.models.adapter import Flow
from nybble.models.adapters.t5 import PART as T5

PART = replace(
    T5,
    name="longt5",
    model_types=("longt5",),
    norm_folds=(),
    linear_folds=(),
    query_key_folds=(),
    limits=("norms and linears can't be folded: attention has other names in the encoder than in the decoder",),
    flows=(
        Flow(name="position_bias", gives=1, takes=1, once=True),
        Flow(name="cross_position_bias", gives=3, takes=4, once=True),
    ),
)
