"""What a metric is: a number per predicted token, averaged, and perhaps a last function of the average."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


class LogitRows:
    """Logits of a few predictions in float32, with what several metrics need of them, computed once when first asked.

    Attributes:
        logits: float32 [T, V].
        targets: int64 [T], the tokens that came.
    """

    def __init__(self, logits: Tensor, targets: Tensor) -> None:
        self.logits = logits
        self.targets = targets

    @cached_property
    def _peak(self) -> Tensor:
        return self.logits.amax(-1, keepdim=True)

    @cached_property
    def weights(self) -> Tensor:
        """exp(logits - largest logit of the row) [T, V]: probabilities but for a factor, without overflow."""
        return (self.logits - self._peak).exp_()

    @cached_property
    def weight_sum(self) -> Tensor:
        """Sum of the weights of each row [T]; probabilities are weights / weight_sum."""
        return self.weights.sum(-1)

    @cached_property
    def log_normalizer(self) -> Tensor:
        """Log sum exp of each row [T]; log p(v) = logits[v] - log_normalizer."""
        # Not torch.logsumexp: that would throw away the exponentials, which KL can use.
        return self.weight_sum.log() + self._peak.squeeze(-1)

    @cached_property
    def top(self) -> Tensor:
        """The likeliest token of each row [T]; the first one among equals."""
        return self.logits.max(-1).indices  # on CPUs three times as fast as argmax

    @cached_property
    def nll(self) -> Tensor:
        """Negative log likelihood of the targets [T], in nats."""
        return self.log_normalizer - self.logits.gather(-1, self.targets[:, None]).squeeze(-1)


def no_change(average: float) -> float:
    """The average itself is the metric."""
    return average


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number about a model on some tokens.

    Attributes:
        per_token: (model's rows, reference's rows) -> a float32 value per prediction [T]. The reference's rows are the
            model's own where a metric doesn't need a reference.
        needs_reference: whether it compares with the float model.
        finish: average over all predictions -> the metric.
        unit: of the metric, for tables.
        summary: one line for listings.
    """

    per_token: Callable[[LogitRows, LogitRows], Tensor]
    needs_reference: bool = False
    finish: Callable[[float], float] = no_change
    unit: str = ""
    summary: str


def total(values: Tensor) -> Tensor:
    """Sum in float64: a hundred thousand float32 terms would cost three digits."""
    return values.sum(dtype=torch.float64)
