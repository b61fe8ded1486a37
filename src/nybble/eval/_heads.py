"""Comparing what the heads of an encoder say: a class for each token or sentence, an answer's place, a word."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nybble.eval._metric import LogitRows, total
from nybble.eval.metrics import METRICS

HEAD_METRICS = ("kl", "agreement")


def _rows(name: str, logits: Tensor, real: Tensor, labels: int) -> Tensor:
    """One head's logits as float32 [choices made, classes].

    Args:
        name: of the head.
        logits: [sentences, tokens, classes], [sentences, classes], or one number for each token (which tokens an answer
            begins and ends at; of each token whether it was replaced).
        real: bool [sentences, tokens], which are no padding.
        labels: classes that the model's config counts.
    """
    logits = logits.float()
    if logits.shape[:2] == real.shape and (logits.ndim == 3 or (name == "logits" and real.shape[1] != labels)):
        rows = logits[real]
        rows = rows if rows.ndim == 2 else rows[:, None]
    elif logits.shape == real.shape and name != "logits":
        rows = logits.masked_fill(~real, torch.finfo(torch.float32).min)
    else:
        rows = logits.reshape(-1, logits.shape[-1])
    # One number is yes against no: a probability of its own would always be 1.
    return torch.cat([rows, torch.zeros_like(rows)], -1) if rows.shape[-1] == 1 else rows


class Heads:
    """Sums of the metrics of one model's heads against the float model's."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, str], Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, logits: Mapping[str, Tensor], reference: Mapping[str, Tensor], real: Tensor, labels: int) -> None:
        """Some sentences: what both say, by head; ``real`` and ``labels`` as of :func:`_rows`."""
        for head, exact in reference.items():
            rows = [_rows(head, of, real, labels) for of in (logits[head], exact)]
            none = torch.zeros(len(rows[0]), dtype=torch.int64, device=rows[0].device)
            own, other = (LogitRows(of, none) for of in rows)
            self.counts[head] = self.counts.get(head, 0) + len(none)
            for metric in HEAD_METRICS:
                value = total(METRICS.get(metric).per_token(own, other))
                self.sums[head, metric] = self.sums.get((head, metric), 0) + value

    def results(self) -> dict[str, float]:
        """Each metric: the mean over choices, of several heads the mean of that; empty without heads."""
        if not self.counts:
            return {}
        means = {key: float(value) / self.counts[key[0]] for key, value in self.sums.items()}
        return {m: sum(means[head, m] for head in self.counts) / len(self.counts) for m in HEAD_METRICS}
