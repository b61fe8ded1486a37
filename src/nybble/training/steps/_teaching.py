"""What a finished network learns from: the float network's logits, all or the largest, or the next token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nybble.core.errors import ModelError
from nybble.core.shapes import Bool, Float, Float32
from nybble.nn.kv_model import no_cache
from nybble.training.steps import Inputs, Student, main_output


@dataclass(frozen=True, kw_only=True)
class Teaching:
    """A loss over samples.

    Attributes:
        student: whose output is judged.
        loss: ``kl``, ``nll`` or ``mse``. temperature: of both distributions of ``kl``.
        teacher: what the float network gives; None for ``nll``, and where ``known`` has all.
        known: by sample, logarithms of the teacher's largest probabilities and their places.
    """

    student: Student
    loss: str
    temperature: float
    teacher: Callable[[Inputs], Any] | None
    known: dict[int, tuple[Tensor, Tensor]]

    @staticmethod
    def of(student: Student, loss: str, temperature: float, top_k: int, size: int) -> Teaching:
        """With ``top_k`` the float network is run once over all samples, ``size`` at a time, and let go of."""
        if loss == "nll":
            return Teaching(student=student, loss=loss, temperature=1.0, teacher=None, known={})
        teacher, known = student.teacher(), dict[int, tuple[Tensor, Tensor]]()
        if not top_k:
            return Teaching(student=student, loss=loss, temperature=temperature, teacher=teacher, known=known)
        for start in range(0, student.samples, size):
            numbers = list(range(start, min(start + size, student.samples)))
            with torch.no_grad():
                logits = _logits(teacher(student.batch(numbers)[0]), loss)
                chances = (logits.float() / temperature).log_softmax(-1)
                largest, places = chances.topk(min(top_k, chances.shape[-1]), -1)
            for at, number in enumerate(numbers):
                known[number] = largest[at].cpu(), places[at].int().cpu()
        return Teaching(student=student, loss=loss, temperature=temperature, teacher=None, known=known)

    def lost(self, numbers: Sequence[int]) -> tuple[Float32[Tensor, ""], float]:
        """Of some samples, the sum of losses and what it is to be divided by: predictions, or the output's power."""
        inputs, real = self.student.batch(list(numbers))
        output = self.student.model(**inputs, **no_cache(self.student.model))
        if self.loss == "nll":
            return _next_token(_logits(output, self.loss), inputs, real)
        if self.loss == "mse":
            assert self.teacher is not None
            with torch.no_grad():
                wanted = _rows(main_output(self.teacher(inputs)), real).float()
            return (_rows(main_output(output), real).float() - wanted).square().sum(), float(wanted.square().sum())
        logits = _rows(_logits(output, self.loss), real).float() / self.temperature
        chances = logits.log_softmax(-1)
        if self.teacher is None:
            pairs = [self.known[number] for number in numbers]
            largest, places = (_rows(torch.stack(each).to(logits.device), real) for each in zip(*pairs, strict=True))
            found = _of_the_largest(chances, largest, places.long())
        else:
            with torch.no_grad():
                wanted = _rows(_logits(self.teacher(inputs), self.loss), real).float() / self.temperature
                wanted = wanted.log_softmax(-1)
            found = (wanted.exp() * (wanted - chances)).sum()
        return self.temperature**2 * found, float(chances.shape[:-1].numel())


@torch.no_grad()
def at_once(student: Student, batch: int) -> int:
    """How many samples one forward takes: the largest divisor of ``batch`` that gives up to a gigabyte of float32."""
    inputs, _ = student.batch([0])
    size = main_output(student.model(**inputs, **no_cache(student.model))).numel()
    divisors = [count for count in range(batch, 0, -1) if batch % count == 0]
    return next((count for count in divisors if count * size <= 1 << 28), 1)


def _logits(output: Any, loss: str) -> Float[Tensor, "*rows classes"]:
    """The logits of an output.

    Raises:
        ModelError: it has none.
    """
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found
    raise ModelError(
        f"distill: loss={loss} reads logits, and the model gives {type(output).__name__} without any; use loss: mse, "
        "which compares what it does give."
    )


def _rows(found: Tensor, real: Bool[Tensor, "samples tokens"] | None) -> Tensor:
    """Without the rows of padding."""
    return found[real] if real is not None and real.shape == found.shape[:2] else found


def _of_the_largest(chances: Tensor, largest: Tensor, places: Tensor) -> Tensor:
    """The divergence of distributions over the teacher's likeliest classes and all others as one.

    Args:
        chances: logarithms of the student's probabilities, float32 [..., classes].
        largest: of the teacher's, the k largest: [..., k].
        places: which classes these are, int64 [..., k].
    """
    mine = chances.gather(-1, places)
    rest, left = (1 - largest.exp().sum(-1)).clamp_min(0), (1 - mine.exp().sum(-1)).clamp_min(1e-12)
    others = torch.where(rest > 0, rest * (rest.clamp_min(1e-12).log() - left.log()), 0.0)
    return (largest.exp() * (largest - mine)).sum() + others.sum()


def _next_token(logits: Tensor, inputs: Inputs, real: Tensor | None) -> tuple[Tensor, float]:
    """Minus the log likelihood of every token behind the first, where both are real."""
    ids = inputs["input_ids"]
    lost = -logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    if real is not None:
        lost = lost[real[:, 1:] & real[:, :-1]]
    return lost.sum(), float(lost.numel())
