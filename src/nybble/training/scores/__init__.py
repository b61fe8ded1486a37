"""How much an example still teaches, one score a file: by what the quantized network makes of it now.

A coreset (:mod:`nybble.training.coreset`) keeps the examples with the highest scores. A file defines ``PART``, a
:class:`Score`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nybble.core.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What is known of examples.

    Attributes:
        student: probabilities that the network in training gives, float [examples, classes].
        teacher: those of the float network; None where no score asks for them.
        labels: int64 [examples].
        drawn: for what is drawn, on the CPU; of the run's seed and the epoch.
    """

    student: Tensor
    teacher: Tensor | None
    labels: Tensor
    drawn: torch.Generator


class Score(ABC):
    """One score.

    Attributes:
        summary: one line.
        taught: whether it needs a teacher.
    """

    summary: ClassVar[str]
    taught: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, seen: Seen) -> Tensor:
        """Scores, float [examples]; the higher, the sooner an example is kept."""


SCORES = Registry("nybble.training.scores", "score of examples", lambda part: isinstance(part, Score))
