"""What a finished network learns from: the float network's logits, all or the largest, or the next token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from nybble.core.errors import ModelError
from nybble.core.shapes import Bool, Float, Float32
from nybble.nn.kv_model import no_cache
from nybble.nn.packed import Packed
from nybble.training.steps import Inputs, Student, main_output

if TYPE_CHECKING:
    from nybble.training.steps.distill import Distill


@dataclass(frozen=True, kw_only=True)
class Teaching:
    """A loss over samples.

    Attributes:
        student: whose output is judged.
        loss: ``kl``, ``nll`` or ``mse``. temperature: of both distributions of ``kl``.
        teacher: what the float network gives; None for ``nll``, and where ``known`` has all.
        known: by sample, logarithms of the teacher's largest probabilities and their places.
        kept: by sample, all that the teacher gives, in its own dtype.
    """

    student: Student
    loss: str
    temperature: float
    teacher: Callable[[Inputs], Any] | None
    known: dict[int, tuple[Tensor, Tensor]]
    kept: dict[int, Tensor]

    @staticmethod
    def of(student: Student, options: Distill) -> Teaching:
        """Where what it gives is kept, the float network is run once over all samples and let go of."""
        loss, temperature, top_k, size = options.loss, options.temperature, options.top_k, options.micro
        if loss == "nll":
            return Teaching(student=student, loss=loss, temperature=1.0, teacher=None, known={}, kept={})
        teacher, known = student.teacher(), dict[int, tuple[Tensor, Tensor]]()
        if not top_k:
            kept = _all_that(teacher, student, size, options.logits_gb * 1e9, loss)
            return Teaching(
                student=student, loss=loss, temperature=temperature, teacher=None if kept else teacher, known={},
                kept=kept,
            )  # fmt: skip
        for start in range(0, student.samples, size):
            numbers = list(range(start, min(start + size, student.samples)))
            with torch.no_grad():
                logits = _logits(teacher(student.batch(numbers)[0]), loss)
                chances = (logits.float() / temperature).log_softmax(-1)
                largest, places = chances.topk(min(top_k, chances.shape[-1]), -1)
            for at, number in enumerate(numbers):
                known[number] = largest[at].cpu(), places[at].int().cpu()
        return Teaching(student=student, loss=loss, temperature=temperature, teacher=None, known=known, kept={})

    def lost(self, numbers: Sequence[int]) -> tuple[Float32[Tensor, ""], float | Tensor]:
        """Of some samples, the sum of losses and what it is to be divided by: predictions, or the output's power."""
        inputs, real = self.student.batch(list(numbers))
        output = self.student.model(**inputs, **no_cache(self.student.model))
        if self.loss == "nll":
            return _next_token(_logits(output, self.loss), inputs, real)
        if self.loss == "mse":
            wanted = _rows(self._taught(numbers, inputs), real).float()
            return (_rows(main_output(output), real).float() - wanted).square().sum(), wanted.square().sum()
        logits = _rows(_logits(output, self.loss), real).float() / self.temperature
        chances = logits.log_softmax(-1)
        if self.known:
            pairs = [self.known[number] for number in numbers]
            largest, places = (_rows(torch.stack(each).to(logits.device), real) for each in zip(*pairs, strict=True))
            found = _of_the_largest(chances, largest, places.long())
        else:
            with torch.no_grad():
                wanted = _rows(self._taught(numbers, inputs), real).float() / self.temperature
                wanted = wanted.log_softmax(-1)
            found = (wanted.exp() * (wanted - chances)).sum()
        return self.temperature**2 * found, float(chances.shape[:-1].numel())

    @torch.no_grad()
    def _taught(self, numbers: Sequence[int], inputs: Inputs) -> Tensor:
        """What the float network gives: kept, or in a run of it."""
        if self.kept:
            return torch.stack([self.kept[number] for number in numbers])
        assert self.teacher is not None
        return _wanted(self.teacher(inputs), self.loss)


@torch.no_grad()
def at_once(student: Student, batch: int) -> tuple[Literal["kl", "mse"], int]:
    """``kl`` of what tells tokens, ``mse`` of what may be any number; and how many samples one forward takes.

    That is the largest divisor of ``batch`` that gives up to a gigabyte of float32.
    """
    inputs, _ = student.batch([0])
    output = student.model(**inputs, **no_cache(student.model))
    size = main_output(output).numel()
    divisors = [count for count in range(batch, 0, -1) if batch % count == 0]
    speaks = student.token_ids and isinstance(getattr(output, "logits", None), Tensor)
    return "kl" if speaks else "mse", next((count for count in divisors if count * size <= 1 << 28), 1)


@torch.no_grad()
def _all_that(
    teacher: Callable[[Inputs], Any], student: Student, size: int, most: float, loss: str
) -> dict[int, Tensor]:
    """What the float network gives, by sample, where that is ``most`` bytes or no more than its own; else nothing.

    Nothing either where one sample's has another shape than the next one's.
    """
    most = max(most, _float_bytes(student))
    found: dict[int, Tensor] = {}
    for start in range(0, student.samples, size):
        numbers = list(range(start, min(start + size, student.samples)))
        given = _wanted(teacher(student.batch(numbers)[0]), loss)
        if len(given) != len(numbers) or given.nbytes * student.samples > most * len(numbers):
            return {}
        if found and given.shape[1:] != found[0].shape:
            return {}
        found |= {number: given[at].clone() for at, number in enumerate(numbers)}
    return found


def _float_bytes(student: Student) -> int:
    """Of the float network's layers that were quantized."""
    packed = [student.model.get_submodule(name) for name in student.weights]
    return sum(p.shape.numel() * (p.dtype or torch.float32).itemsize for p in packed if isinstance(p, Packed))


def _wanted(output: Any, loss: str) -> Tensor:
    """What is compared."""
    return main_output(output) if loss == "mse" else _logits(output, loss)


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
