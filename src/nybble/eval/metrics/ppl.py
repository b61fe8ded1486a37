"""Perplexity, exp of the mean negative log likelihood over all predictions.

The convention: windows of L tokens that don't overlap, each predicted from its own beginning. A window gives L - 1
predictions; its first token is context only. Numbers compare only at the same tokenizer, text and L.
"""

from __future__ import annotations

import math

from nybble.eval._metric import Metric


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:  # above 709 nats a token: a model that is broken, but not undefined
        return math.inf


PART = Metric(
    per_token=lambda rows, reference: rows.nll,
    finish=_exp,
    unit="",
    summary="perplexity: exp of the mean negative log likelihood",
)
