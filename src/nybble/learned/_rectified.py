"""AdaRound's rounding variable: a stretched sigmoid that reaches 0 and 1, and the term that pushes it there.

Nagel et al. 2020, arXiv:2004.10568, eq. 21-24 (Louizos et al. 2018's rectified sigmoid).
"""

from __future__ import annotations

import torch
from torch import Tensor

ZETA, GAMMA = 1.1, -0.1


def rectified(v: Tensor) -> Tensor:
    """``h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1)``, zeta = 1.1, gamma = -0.1."""
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def logits_of(h: Tensor) -> Tensor:
    """The V with ``rectified(V) = h``, for h in 0..1; float32."""
    return -torch.log((ZETA - GAMMA) / (h - GAMMA) - 1)


def decisiveness(h: Tensor, beta: float) -> Tensor:
    """``sum(1 - |2 h - 1|^beta)``: 0 where every h is 0 or 1. A sum: it grows with the tensor, as the paper's does."""
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


def annealed(t: float, start: float, end: float, warmup: float) -> float | None:
    """The exponent at progress ``t``: None (no term) before ``warmup`` (< 1), then linear from ``start`` to ``end``."""
    return None if t < warmup else start + (end - start) * min(1.0, (t - warmup) / (1 - warmup))
