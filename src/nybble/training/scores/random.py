"""No score: examples are drawn anew for each coreset, which is what the others are measured against."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from nybble.training.scores import Score, Seen


class Random(Score):
    """See the module; uniform, 0 to 1."""

    summary: ClassVar[str] = "drawn, the baseline"

    def __call__(self, seen: Seen) -> Tensor:  # noqa: D102
        return torch.rand(len(seen.labels), generator=seen.drawn).to(seen.student.device)


PART = Random()
