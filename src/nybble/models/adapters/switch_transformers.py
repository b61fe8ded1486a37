"""Switch Transformers: T5 with a mixture of experts in some blocks; the first block's attention bias serves all."""

from __future__ import annotations

from dataclasses import replace

from nybble.models.adapters.t5 import PART as T5

PART = replace(
    T5,
    name="switch-transformers",
    model_types=("switch_transformers",),
    norm_folds=(),
    linear_folds=(),
    query_key_folds=(),
    limits=("norms and linears can't be folded: what reads a norm differs between dense and sparse blocks",),
)
