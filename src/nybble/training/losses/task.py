"""The task's own loss, of the labels: what the network gives as ``loss`` when it is called with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nybble.core.errors import ModelError
from nybble.training.losses import Lesson, Loss
from nybble.training.losses._outputs import wide


@dataclass(frozen=True, kw_only=True)
class Task(Loss):
    """Cross-entropy of the labelled tokens or classes, the squared error of a head that gives one number; in nats."""

    taught: ClassVar[bool] = False

    def __call__(self, lesson: Lesson) -> Tensor:  # noqa: D102
        found = getattr(lesson.student, "loss", None)
        if not isinstance(found, Tensor):
            raise ModelError(
                f"loss task: the model gives {type(lesson.student).__name__} without a loss; call it with labels, or "
                "leave this loss out and teach it by a teacher's logits."
            )
        return wide(found)


PART = Task
