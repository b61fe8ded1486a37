"""Disagreement score (DS): how far the quantized network's probabilities are from the float one's, ``||p_Q - p_F||_2``.

It is the norm of the gradient that cross-entropy with the teacher (at temperature 1) has in the logits; labels have no
part in it. Huang et al. 2023, arXiv:2306.07215.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from nybble.training.scores import Score, Seen


class Disagreement(Score):
    """See the module; 0 where both agree, up to the root of 2."""

    summary: ClassVar[str] = "distance of the quantized network's probabilities from the float one's"
    taught: ClassVar[bool] = True

    def __call__(self, seen: Seen) -> Tensor:  # noqa: D102
        assert seen.teacher is not None
        found: Tensor = torch.linalg.vector_norm(seen.student - seen.teacher, dim=-1)
        return found


PART = Disagreement()
