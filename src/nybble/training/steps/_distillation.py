"""The loop of a distillation: steps over batches, looks at samples that are held back, the best state of all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nybble.calibration.finite import require_number
from nybble.core.curve import curve, short
from nybble.core.keeping import Best
from nybble.core.progress import Progress, task
from nybble.core.seeds import generator
from nybble.training.learners import Learners, unit_of
from nybble.training.steps import MODEL, Student
from nybble.training.steps._adam import Adam
from nybble.training.steps._teaching import Teaching

if TYPE_CHECKING:
    from nybble.training.steps.distill import Distill

DEFAULT_RATE = 3e-3


class Distillation:
    """One training.

    Args:
        options: of it. student: what learns, with what learns in it (``learners``) in place. lessons: the loss.
        progress: told after each step.
    """

    def __init__(
        self, options: Distill, student: Student, lessons: Teaching, learners: Learners, progress: Progress
    ) -> None:
        self.options, self.student, self.lessons, self.learners = options, student, lessons, learners
        self.progress, self.parameters = progress, learners.parameters()
        default = options.rates.get("default", DEFAULT_RATE)
        rates = []
        for kind, parameters in learners.groups().items():
            rate = options.rates.get(kind, default)
            for parameter in parameters:
                rates.append(rate * unit_of(parameter, options.relative))
        self.optimizer = Adam(self.parameters, rates)
        self.once = learners.dense_bytes() <= options.dense_gb * 1e9

    def train(self, numbers: Sequence[int], held: Sequence[int]) -> dict[str, Any]:
        """Move what learns, and end in the best state; what the report says of it."""
        options, best, losses = self.options, Best(self.parameters), list[float]()
        before, looks = self._judged(held), 0
        self._check(held[: options.micro], before, 0)
        best.see(before, 0)
        draws = generator(self.student.seed, "distill", "samples")
        order: list[int] = []
        with task(self.progress, options.steps, "distill") as bar:
            for step in range(options.steps):
                while len(order) < options.batch:
                    order += [numbers[i] for i in torch.randperm(len(numbers), generator=draws).tolist()]
                batch, order = order[: options.batch], order[options.batch :]
                losses.append(self._step(batch, step))
                if (step + 1) % options.every == 0 or step + 1 == options.steps:
                    best.see(self._judged(held), step + 1)
                    looks = 0 if best.step == step + 1 else looks + 1
                bar.advance(note=f"{best.judged:.4g} of {before:.4g}")
                if options.patience and looks >= options.patience:
                    break
        best.restore()
        kept = "start" if not best.step else "last" if best.step == len(losses) else best.step
        return {
            "window": MODEL, "blocks": max(1, len(self.student.blocks)), "loss": f"distill, {options.loss}",
            "before": short(before), "after": short(best.judged), "steps": len(losses), "kept": kept,
            "diverged": False, "curve": curve(losses),
        }  # fmt: skip

    def _step(self, batch: Sequence[int], step: int) -> float:
        """One step of the optimizer; the batch's loss before it."""
        for parameter in self.parameters:
            parameter.grad = None
        parts, losses, counts = self._parts(batch), list[Tensor](), list[float | Tensor]()
        with self._weights():
            for part in parts:
                with self._precision():
                    lost, rows = self.lessons.lost(part)
                torch.autograd.backward(lost)
                losses.append(lost.detach())
                counts.append(rows)
        found: list[float] = torch.stack(losses).tolist()  # the one time in a step that the device is waited for
        for part, loss in zip(parts, found, strict=True):
            self._check(part, loss, step)
        count = max(sum(map(float, counts)), 1e-20)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        torch._foreach_div_(gradients, count)
        if self.options.max_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.options.max_norm)
        self.optimizer.step(self._share(step))
        return sum(found) / count

    def _check(self, numbers: Sequence[int], loss: float, step: int) -> None:
        """Raise LearningError for samples whose loss is no number."""
        owners = [name.removesuffix(".weight") for name in self.learners.scales]
        layers = {name: self.student.model.get_submodule(name) for name in owners}
        require_number(loss, step, "distill", layers, lambda: self.lessons.lost(numbers))

    def _weights(self) -> AbstractContextManager[None]:
        """Dense weights once for all parts, where they may all be there."""
        return self.learners.made() if self.once else nullcontext()

    @torch.no_grad()
    def _judged(self, held: Sequence[int]) -> float:
        """The mean loss of the samples that are held back; infinite where it is no number."""
        with self._weights():
            found = [self.lessons.lost(part) for part in self._parts(held)]
        total = sum(float(lost) for lost, _ in found) / max(sum(float(rows) for _, rows in found), 1e-20)
        return total if math.isfinite(total) else math.inf

    def _parts(self, numbers: Sequence[int]) -> list[Sequence[int]]:
        size = self.options.micro
        return [numbers[start : start + size] for start in range(0, len(numbers), size)]

    def _precision(self) -> torch.autocast:
        """Of products in a training step."""
        parameter = next(self.student.model.parameters())
        wanted = self.options.precision == "bfloat16" and parameter.dtype == torch.float32
        # no cache: weights may be made anew in every forward
        return torch.autocast(parameter.device.type, torch.bfloat16, enabled=wanted, cache_enabled=False)

    def _share(self, step: int) -> float:
        """Of every rate: rises in a line, then falls as half a cosine to ``final``."""
        options = self.options
        warm = round(options.warmup * options.steps)
        if step < warm:
            return (step + 1) / warm
        fallen = 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, options.steps - warm)))
        return options.final + (1 - options.final) * fallen
