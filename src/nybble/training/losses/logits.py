"""The teacher's logits: Kullback-Leibler divergence, soft cross-entropy, or squared difference.

Distillation as of Hinton, Vinyals and Dean (2015), equation 1 and what follows it: both distributions at temperature T,
the loss times T squared. LLM-QAT, BiT and TBT take T = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from nybble.core.errors import ModelError, SchemeError
from nybble.training.losses import Lesson, Loss
from nybble.training.losses._outputs import logits_of


@dataclass(frozen=True, kw_only=True)
class Logits(Loss):
    """See the module. Every row of logits (a token, a record) has one loss, a sum over its classes.

    Attributes:
        form: ``kl``, 0 where both agree; ``ce``, -sum p_teacher log p_student, which is the teacher's entropy more and
            has the same gradient; ``mse``, the sum of squared differences: the one for heads that give one number.
        temperature: of both distributions, ``ce`` and ``kl`` alone.
        reduction: ``mean`` over rows; ``batchmean``: their sum over the number of samples, as LLM-QAT's released code
            has it; ``elements``: the mean over rows and classes, as BiT's has it.
        padding: whether rows of padding count, as they do in TBT's released code.
    """

    form: Literal["kl", "ce", "mse"] = "kl"
    temperature: float = 1.0
    reduction: Literal["mean", "batchmean", "elements"] = "mean"
    padding: bool = False

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise SchemeError(f"loss logits: temperature is {self.temperature}; it must be above 0.")
        if self.form == "mse" and self.temperature != 1:
            raise SchemeError("loss logits: form mse compares logits as they are; leave temperature out.")

    def __call__(self, lesson: Lesson) -> Tensor:  # noqa: D102
        student, teacher = self._logits(lesson)
        if self.form == "mse":
            return self._reduced((student - teacher).square().sum(-1), lesson, student.shape[-1])
        chances, wanted = ((x / self.temperature).log_softmax(-1) for x in (student, teacher))
        if self.form == "ce":
            rows = -(wanted.exp() * chances).sum(-1)
        else:
            rows = functional.kl_div(chances, wanted, log_target=True, reduction="none").sum(-1)
        return self.temperature**2 * self._reduced(rows, lesson, student.shape[-1])

    @torch.no_grad()
    def entropy(self, lesson: Lesson) -> Tensor:  # noqa: D102
        if self.form != "ce":
            return super().entropy(lesson)
        _, teacher = self._logits(lesson)
        wanted = (teacher / self.temperature).log_softmax(-1)
        return self.temperature**2 * self._reduced(-(wanted.exp() * wanted).sum(-1), lesson, teacher.shape[-1])

    def _logits(self, lesson: Lesson) -> tuple[Tensor, Tensor]:
        student, teacher = logits_of(lesson, "logits")
        if student.shape[-1] == 1 and self.form != "mse":
            raise ModelError(
                f"loss logits: the model gives one number a row, whose softmax is always 1: form {self.form} would "
                "teach nothing. Take form: mse."
            )
        return student, teacher

    def _reduced(self, rows: Tensor, lesson: Lesson, classes: int) -> Tensor:
        """A loss a row to one."""
        counted = torch.ones_like(rows, dtype=torch.bool) if self.padding else lesson.counted
        total = torch.where(counted, rows, 0).sum()
        if self.reduction == "batchmean":
            return total / len(rows)
        return total / counted.sum().clamp_min(1) / (classes if self.reduction == "elements" else 1)


PART = Logits
