"""AdaRound's rounding variable: a stretched sigmoid that reaches 0 and 1, and the term that pushes it there.

Nagel et al. 2020, arXiv:2004.10568, eq. 21-24 (Louizos et al. 2018's rectified sigmoid).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.core.errors import SchemeError

ZETA, GAMMA = 1.1, -0.1


def rectified(v: Tensor) -> Tensor:
    """``h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1)``, zeta = 1.1, gamma = -0.1."""
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def logits_of(h: Tensor) -> Tensor:
    """The V with ``rectified(V) = h``, for h in 0..1; float32."""
    return -torch.log((ZETA - GAMMA) / (h - GAMMA) - 1)


def decisiveness(h: Tensor, beta: float | Tensor) -> Tensor:
    """``sum(1 - |2 h - 1|^beta)``: 0 where every h is 0 or 1. A sum: it grows with the tensor, as the paper's does."""
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


def annealed(t: float, start: float, end: float, warmup: float) -> float | None:
    """The exponent at progress ``t``: None (no term) before ``warmup`` (< 1), then linear from ``start`` to ``end``."""
    return None if t < warmup else start + (end - start) * min(1.0, (t - warmup) / (1 - warmup))


@dataclass(frozen=True, kw_only=True)
class Deciding:
    """Options of a part whose roundings a penalty closes.

    Attributes:
        strength: lambda, of the penalty. beta_start, beta_end: its exponent, when it sets in and at the end.
        warmup: the share of training without the penalty.
    """

    strength: float = 0.01
    beta_start: float = 20.0
    beta_end: float = 2.0
    warmup: float = 0.0

    def check_penalty(self, name: str) -> None:
        """Raise SchemeError where there is no such penalty; ``name``: the part's."""
        if not 0 <= self.warmup < 1 or self.strength < 0 or not 1 <= self.beta_end <= self.beta_start:
            raise SchemeError(
                f"{name}: warmup is 0 to below 1, strength >= 0 and beta_start >= beta_end >= 1; got {self}."
            )

    def term(self, h: Tensor, t: float | Tensor) -> Tensor:
        """The penalty of roundings ``h`` in 0..1 at progress ``t``: float32, no dimensions.

        Of a ``t`` that is a tensor the same is calculated without a decision on the processor.
        """
        if isinstance(t, Tensor):
            share = ((t - self.warmup) / (1 - self.warmup)).clamp(0, 1)
            beta_now = self.beta_start + (self.beta_end - self.beta_start) * share
            return torch.where(t < self.warmup, 0.0, self.strength) * decisiveness(h, beta_now)
        beta = annealed(t, self.beta_start, self.beta_end, self.warmup)
        return h.new_zeros(()) if beta is None else self.strength * decisiveness(h, beta)
