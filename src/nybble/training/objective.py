"""What a network is told in training: a weighted sum of losses, beside a float network where one asks for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.errors import SchemeError
from nybble.core.options import build
from nybble.nn.attention import IMPLEMENTATION
from nybble.nn.fake import penalty_of
from nybble.training.losses import LOSSES, Lesson, Loss
from nybble.training.tasks import Task


def make_losses(given: Mapping[str, Any]) -> list[tuple[str, float, Loss]]:
    """Name, weight, loss.

    Args:
        given: by name a weight, or a mapping of ``weight`` (left out: 1) and the loss's options. A weight of 0 leaves
            the loss out.

    Raises:
        UsageError: no such loss. SchemeError: an unknown option, a wrong value, or nothing at all.
    """
    found = []
    for name, what in given.items():
        options = dict(what) if isinstance(what, Mapping) else {"weight": what}
        weight = options.pop("weight", 1.0)
        if not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
            raise SchemeError(
                f"losses: {name} has a weight of 0 or more, or a mapping of it and options; got {what!r}."
            )
        made = build(LOSSES.get(name), options, f"losses: {name}")
        if weight:
            found.append((name, float(weight), made))
    if not found:
        raise SchemeError("losses: nothing is left to learn from; name task, or logits.")
    return found


class Objective:
    """The sum of some losses.

    Args:
        task: of the model. losses: from :func:`make_losses`.
        teacher: the float network, in eval mode; needed where a loss is taught.

    Attributes:
        last: each loss, unweighted, of the newest call.
    """

    def __init__(self, task: Task, losses: list[tuple[str, float, Loss]], teacher: nn.Module | None) -> None:
        self.task, self.losses, self.teacher = task, losses, teacher
        self.more = {name: True for _, _, loss in losses for name in loss.outputs}
        self.last: dict[str, Tensor] = {}
        if teacher is not None:
            self._with_maps(teacher)

    @contextmanager
    def served(self, model: Any) -> Iterator[None]:
        """Inside, a network gives what the losses ask for: of transformers' attentions the eager one has maps."""
        before = self._with_maps(model)
        yield
        if before is not None:
            model.set_attn_implementation(before)

    def _with_maps(self, model: Any) -> str | None:
        """Returns what attention it had, where it has another one now; the one that rounds operands has maps too."""
        before = getattr(getattr(model, "config", None), "_attn_implementation", None)
        if not self.more.get("output_attentions") or before in (IMPLEMENTATION, "eager"):
            return None
        model.set_attn_implementation("eager")
        return before

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], progress: float) -> Tensor:
        """The loss of a batch.

        Args:
            model: in training mode or not.
            batch: from the task's ``collate``, on the model's device.
            progress: of the training, 0 to 1, for penalties that change with it.

        Returns:
            a scalar with a gradient.
        """
        given = dict(batch) | self.more
        student: Any = model(**given)
        taught: Any = None
        if self.teacher is not None:
            with torch.no_grad():
                taught = self.teacher(**in_its_dtype(self.teacher, given))
        lesson = Lesson(
            student=student, teacher=taught, batch=batch, counted=self.task.counted(batch, student.logits)
        )  # fmt: skip
        total = penalty_of(model, progress).to(student.logits.device)
        self.last = {}
        for name, weight, loss in self.losses:
            found = loss(lesson)
            self.last[name] = found.detach()
            total = total + weight * found
        return total


def in_its_dtype(model: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    """Pixels and samples in the dtype of a network's weights: a teacher's may not be the student's."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    floats = {name: t.to(dtype) for name, t in given.items() if isinstance(t, Tensor) and t.is_floating_point()}
    return {**given, **floats}


def needs_teacher(losses: list[tuple[str, float, Loss]]) -> bool:
    """Whether one of them compares with the float network."""
    return any(loss.taught for _, _, loss in losses)
