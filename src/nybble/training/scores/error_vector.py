"""Error vector score (EVS): how far the quantized network's probabilities are from the label, ``||p_Q - y||_2``.

It is the norm of the gradient that cross-entropy with the label has in the logits. Huang et al. 2023, "Efficient and
Robust Quantization-aware Training via Adaptive Coreset Selection", arXiv:2306.07215.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from nybble.training.scores import Score, Seen


class ErrorVector(Score):
    """See the module; 0 where the label has all of the probability, up to the root of 2."""

    summary: ClassVar[str] = "distance of the quantized network's probabilities from the label"

    def __call__(self, seen: Seen) -> Tensor:  # noqa: D102
        wanted = functional.one_hot(seen.labels, seen.student.shape[-1])
        found: Tensor = torch.linalg.vector_norm(seen.student - wanted.to(seen.student), dim=-1)
        return found


PART = ErrorVector()
