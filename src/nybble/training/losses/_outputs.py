"""What losses compare of two outputs: logits, and the states or maps that each layer gives, with what is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from nybble.core.errors import ModelError, SchemeError
from nybble.training.losses import Lesson

Pair = tuple[Tensor, Tensor]
"""A student's, and its teacher's without gradient."""


def wide(x: Tensor) -> Tensor:
    """In float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def teacher_of(lesson: Lesson, loss: str) -> Any:
    """The float network's output.

    Raises:
        ModelError: there is none.
    """
    if lesson.teacher is None:
        raise ModelError(f"loss {loss} compares with a teacher, and there is none; name one, or leave this loss out.")
    return lesson.teacher


def logits_of(lesson: Lesson, loss: str) -> Pair:
    """Both networks' logits, [..., classes].

    Raises:
        ModelError: one gives none, or they have different shapes.
    """
    found = []
    for who, output in (("student", lesson.student), ("teacher", teacher_of(lesson, loss))):
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise ModelError(
                f"loss {loss}: the {who} gives {type(output).__name__} without logits; take loss hidden, which "
                "compares layers' outputs."
            )
        found.append(wide(logits))
    student, teacher = found
    if student.shape != teacher.shape:
        raise ModelError(
            f"loss {loss}: the student's logits are {_sizes(student)}, the teacher's {_sizes(teacher)}; both need the "
            "same classes (or vocabulary)."
        )
    return student, teacher.detach()


def layers_of(
    lesson: Lesson, names: Sequence[str], loss: str, chosen: Sequence[int], remedy: str
) -> Iterator[tuple[str, Pair]]:
    """What layers give, of all of ``names`` that an output has.

    Args:
        lesson: both outputs.
        names: ``hidden_states``, ``encoder_hidden_states`` ...
        loss: its name, for messages.
        chosen: which layers, negative ones from the end; none: all.
        remedy: what to do where a network gives none.

    Yields:
        the name, and both tensors of a layer.

    Raises:
        ModelError: a network gives none, or not as many layers, or of another shape. SchemeError: no such layer.
    """
    teacher = teacher_of(lesson, loss)
    have = [name for name in names if _given(lesson.student, name)]
    lacking = [name for name in have if not _given(teacher, name)]
    if not have or lacking:
        who, what = ("teacher", lacking) if have else ("student", names)
        raise ModelError(f"loss {loss}: the {who} gives no {' or '.join(what)}. {remedy}")
    for name in have:
        students, teachers = _given(lesson.student, name), _given(teacher, name)
        if len(students) != len(teachers):
            raise ModelError(
                f"loss {loss}: the student has {len(students)} {name}, the teacher {len(teachers)}; this loss compares "
                "networks of equally many layers."
            )
        for number in _numbers(chosen, len(students), name, loss):
            yield name, _pair(students[number], teachers[number], f"{name}[{number}]", loss)


def mean_square(student: Tensor, teacher: Tensor, real: Tensor | None) -> Tensor:
    """Mean squared difference; of what ``real`` (bool, broadcast against both) says, where it is given."""
    lost = (student - teacher).square()
    if real is None:
        return lost.mean()
    mask = real.expand_as(lost)
    return torch.where(mask, lost, 0).sum() / mask.sum().clamp_min(1)


def real_tokens(lesson: Lesson, name: str, size: int, loss: str) -> Tensor:
    """Which tokens are no padding where a state or map called ``name`` has ``size`` of them: bool [samples, size].

    Of a decoder that reads along with an encoder ``counted`` says it, of all others the attention mask.

    Raises:
        ModelError: nothing says it for so many.
    """
    mask = lesson.batch.get("attention_mask")
    decodes = name.startswith(("decoder_", "cross_")) and lesson.counted.dim() == 2
    found = lesson.counted if decodes or (mask is None and lesson.counted.dim() == 2) else mask
    if found is None:
        found = torch.ones(len(lesson.counted), size, dtype=torch.bool, device=lesson.counted.device)
    if found.shape[1:] != (size,):
        raise ModelError(
            f"loss {loss}: {name} has {size} tokens, and what is padding is known of {_sizes(found)}; set padding: "
            "true, which compares all of them."
        )
    return found.bool()


def _given(output: Any, name: str) -> tuple[Tensor, ...]:
    """The tensor of each layer; none where a network doesn't give them, or gives something in their stead."""
    found = getattr(output, name, None) or ()
    return tuple(found) if all(isinstance(each, Tensor) for each in found) else ()


def _pair(student: Tensor, teacher: Tensor, what: str, loss: str) -> Pair:
    if student.shape != teacher.shape:
        raise ModelError(
            f"loss {loss}: {what} is {_sizes(student)} of the student and {_sizes(teacher)} of the teacher; this loss "
            "compares networks of one width."
        )
    return wide(student), wide(teacher).detach()


def _numbers(chosen: Sequence[int], count: int, name: str, loss: str) -> Sequence[int]:
    if not chosen:
        return range(count)
    wrong = [number for number in chosen if not -count <= number < count]
    if wrong:
        raise SchemeError(f"loss {loss}: layers names {wrong[0]}, and there are {count} {name}, 0 to {count - 1}.")
    return [number % count for number in chosen]


def _sizes(x: Tensor) -> str:
    return " x ".join(map(str, x.shape)) or "a scalar"
