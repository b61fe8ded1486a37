"""Negative log likelihood per token, in nats: the logarithm of perplexity, and what differences are taken of."""

from __future__ import annotations

from nybble.eval._metric import Metric

PART = Metric(
    per_token=lambda rows, reference: rows.nll,
    unit="nats/token",
    summary="mean negative log likelihood of the token that came",
)
