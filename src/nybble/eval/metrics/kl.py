"""Kullback-Leibler divergence KL(float || quantized) of the next-token distributions, mean per token, in nats.

    KL = sum_v p(v) (log p(v) - log q(v)),   p: reference, q: model      Kullback & Leibler 1951

Unlike perplexity it counts every change, for the better too, and needs no labels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.eval._metric import LogitRows, Metric


def _kl(rows: LogitRows, reference: LogitRows) -> Tensor:
    # With log p = z_p - Z_p, log q = z_q - Z_q: differences first, so that equal models give exactly 0.
    difference = torch.sub(reference.logits, rows.logits)
    average = difference.mul_(reference.weights).sum(-1) / reference.weight_sum
    return average - (reference.log_normalizer - rows.log_normalizer)


PART = Metric(
    per_token=_kl,
    needs_reference=True,
    unit="nats/token",
    summary="KL divergence from the float model's next-token distribution",
)
