"""What a network in training is told by, one loss a file: the labels of its task, and what a float network makes of it.

A training adds some of them, each with a weight. A file defines ``PART``, a :class:`Loss` with its options as fields.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nybble.core.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What one forward gave.

    Attributes:
        student: the output of the network in training. teacher: that of the float one; None where nothing asks for it.
        batch: what both were called with.
        counted: bool, the shape of the logits without classes: those of something real.
    """

    student: Any
    teacher: Any
    batch: Mapping[str, Tensor]
    counted: Tensor


@dataclass(frozen=True, kw_only=True)
class Loss(ABC):
    """One loss; its fields are its options.

    Attributes:
        taught: whether it needs a teacher.
        outputs: what it asks of the forwards beside logits: ``output_hidden_states``, ``output_attentions``.
    """

    taught: ClassVar[bool] = True
    outputs: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def __call__(self, lesson: Lesson) -> Tensor:
        """The loss, a float32 scalar with a gradient to what trains.

        Raises:
            ModelError: an output that it needs is missing.
        """

    def entropy(self, lesson: Lesson) -> Tensor:
        """What the loss is where student and teacher agree: 0, but for cross-entropies."""
        return torch.zeros((), device=lesson.counted.device)


LOSSES = Registry("nybble.training.losses", "training loss")
