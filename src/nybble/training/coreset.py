"""A part of the examples to train on, chosen again every few epochs by the network as it is then (ACS).

    d(x; t) = beta(t) first(x) + (1 - beta(t)) last(x)

Huang et al. 2023, arXiv:2306.07215: ``first`` is the error vector score, ``last`` the disagreement score, and beta
falls from 1 to 0 over the epochs. The examples with the highest d are kept, in each class the same share.

What was chosen is written beside the checkpoints, so that a run that is gone on with trains on the same examples.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nybble.core import ranks
from nybble.core.errors import DataError, LearningError, ModelError, UsageError
from nybble.core.files import atomic_write_json
from nybble.core.seeds import generator
from nybble.nn.in_place import evaluation_mode
from nybble.training.objective import in_its_dtype
from nybble.training.scores import SCORES, Score, Seen
from nybble.training.tasks import Row, Task

PART = 64  # examples that are scored at a time


@dataclass(frozen=True, kw_only=True)
class CoresetOptions:
    """Of the choice; the defaults are the paper's.

    Attributes:
        fraction: of the examples that is trained on, above 0, up to 1.
        every: epochs (over the kept examples) from one choice to the next.
        first: score at the beginning. last: score at the end; none: ``first`` throughout.
        schedule: of the first one's weight: ``cosine``, cos(pi t / 2E), as the paper has it; ``half-cosine``, its
            square, as the released code has it; ``linear``.
        balanced: keep the fraction of each class, and not of all examples together.
    """

    fraction: float = 0.1
    every: int = 10
    first: str = "error-vector"
    last: str | None = "disagreement"
    schedule: Literal["cosine", "half-cosine", "linear"] = "cosine"
    balanced: bool = True

    def check(self) -> None:
        """Refuse what the types of the fields let through.

        Raises:
            UsageError: names the option and what it may be.
        """
        if not 0 < self.fraction <= 1:
            raise UsageError(f"coreset: fraction is {self.fraction}; it is above 0, and 1 is all examples.")
        if self.every < 1:
            raise UsageError(f"coreset: every is {self.every}; it is 1 epoch or more.")
        for name in (self.first, self.last):
            if name is not None:
                SCORES.check(name)

    @property
    def taught(self) -> bool:
        """Whether a score compares with the float network."""
        return any(SCORES.get(name).taught for name in (self.first, self.last) if name is not None)

    def weight(self, past: float) -> float:
        """Of the first score, where ``past`` (0 to 1) of the epochs are over."""
        if self.last is None:
            return 1.0
        if self.schedule == "linear":
            return 1 - past
        found = math.cos(math.pi * past / 2)
        return found if self.schedule == "cosine" else found * found

    def sizes(self, labels: Sequence[int]) -> dict[int | None, int]:
        """How many are kept, by class; of all together under None.

        Raises:
            DataError: of one nothing is; names a fraction that keeps one of each.
        """
        counts: dict[int | None, int] = dict(sorted(Counter(labels).items())) if self.balanced else {None: len(labels)}
        found = {kind: round(self.fraction * count) for kind, count in counts.items()}
        for kind, kept in found.items():
            if kept == 0:
                of = "" if kind is None else f" of class {kind}"
                least = 1 / min(counts.values())
                raise DataError(
                    f"coreset: a fraction of {self.fraction} keeps none of the {counts[kind]} examples{of}; give "
                    f"{min(1.0, math.ceil(least * 1000) / 1000)} or more, or more examples."
                )
        return found


def chosen_of(scores: Tensor, labels: Sequence[int], options: CoresetOptions) -> list[int]:
    """Numbers of the examples with the highest scores, ascending; of equal ones the first.

    Args:
        scores: float [examples].
        labels: class of each.
        options: how many, and whether of each class.
    """
    order = scores.argsort(descending=True, stable=True).tolist()
    left = options.sizes(labels)
    kept = []
    for at in order:
        kind = labels[at] if options.balanced else None
        if left[kind]:
            left[kind] -= 1
            kept.append(at)
    return sorted(kept)


class Coreset:
    """The examples of each epoch of a run.

    Args:
        options: checked. task: of the model. rows: all examples.
        model: in training. teacher: the float network, in eval mode; None where no score asks for it.
        epochs: of the whole run. seed: of the run. folder: for what was chosen.
    """

    def __init__(
        self,
        options: CoresetOptions,
        task: Task,
        rows: Sequence[Row],
        *,
        model: nn.Module,
        teacher: nn.Module | None,
        epochs: int,
        seed: int,
        folder: Path,
    ) -> None:
        self.options, self.task, self.rows, self.model, self.teacher = options, task, rows, model, teacher
        self.epochs, self.seed, self.folder = epochs, seed, folder
        self.labels = task.classes_of(rows)
        self.size = sum(options.sizes(self.labels).values())
        self._taught: Tensor | None = None

    def of_epoch(self, epoch: int) -> list[int]:
        """Numbers of the examples that an epoch trains on; chosen now where it is one in which that is done."""
        begun = epoch - epoch % self.options.every
        at = self.folder / f"coreset-{begun}.json"

        def choose() -> list[int]:
            if not at.exists():
                kept = chosen_of(self.scores(begun), self.labels, self.options)
                self.folder.mkdir(parents=True, exist_ok=True)
                atomic_write_json(at, kept)
            found: list[int] = json.loads(at.read_text(encoding="utf-8"))
            return found

        return ranks.lead_alone(choose)

    def scores(self, epoch: int) -> Tensor:
        """Of all examples, float32 [examples] on the CPU; the network is left as it was.

        Raises:
            LearningError: the network gives NaN. ModelError: the teacher tells other classes.
        """
        options = self.options
        student = self._probabilities(self.model)
        if options.taught and self._taught is None:
            assert self.teacher is not None
            self._taught = self._probabilities(self.teacher)
            if self._taught.shape != student.shape:
                raise ModelError(
                    f"coreset: the network tells {student.shape[-1]} classes and its teacher {self._taught.shape[-1]}; "
                    "give a teacher of the same."
                )
        if not student.isfinite().all():
            raise LearningError(f"coreset: the network gives NaN behind epoch {epoch}; use a smaller lr.")
        drawn = generator(self.seed, "coreset", str(epoch))
        seen = Seen(student=student, teacher=self._taught, labels=torch.tensor(self.labels), drawn=drawn)
        weight = options.weight(min(1.0, epoch / self.epochs))
        parts: list[tuple[float, Score]] = [(weight, SCORES.get(options.first))]
        parts += [] if options.last is None else [(1 - weight, SCORES.get(options.last))]
        return torch.stack([share * score(seen) for share, score in parts]).sum(0)

    @torch.no_grad()
    def _probabilities(self, model: Any) -> Tensor:
        """Float32 [examples, classes] on the CPU, in eval mode, each image as it is."""
        device, found = next(model.parameters()).device, list[Tensor]()
        with evaluation_mode(model):
            for start in range(0, len(self.rows), PART):
                batch = self.task.collate(self.rows[start : start + PART])
                given = {name: t.to(device) for name, t in batch.items() if name != "labels"}
                found.append(model(**in_its_dtype(model, given)).logits.float().softmax(-1).cpu())
        return torch.cat(found)
