"""Vision transformers with heads and MLPs of their own sizes (:mod:`nybble.models.own.slim_vit`)."""

from __future__ import annotations

from dataclasses import replace

from nybble.models.adapters.vit import PART as VIT

PART = replace(
    VIT,
    name="slim-vit",
    model_types=("nybble-slim-vit",),
    linear_folds=(),
    query_key_folds=(),
    limits=(*VIT.limits, "attention's layers can't be folded into each other: heads have sizes of their own"),
)
