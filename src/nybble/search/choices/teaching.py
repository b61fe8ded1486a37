"""What searched networks learn from: examples, split by class, and a teacher's soft answers to them.

    L = -sum softmax(teacher / T) log softmax(student / T)      without T squared, as the released code has it

Liu et al. 2022, arXiv:2112.02086. Where no data is given, images are made of the teacher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.errors import DataError, ModelError
from nybble.core.seeds import generator
from nybble.data.images import SYNTHESISED, Preparation, preparation_for
from nybble.data.labelled import class_names
from nybble.search.architectures._study import Study
from nybble.training.losses._outputs import wide
from nybble.training.norms import measure_norms
from nybble.training.objective import Objective, in_its_dtype
from nybble.training.synthesis.folder import made_in, write_images
from nybble.training.synthesis.images import Maker
from nybble.training.synthesis.options import Synthesis
from nybble.training.synthesis.terms import soft_cross_entropy
from nybble.training.tasks import TASKS, Augment, Row, Task


def prepared_for(study: Study) -> Preparation:
    """How the teacher takes images.

    Raises:
        ModelError: it is no classifier of images.
    """
    assert study.origin is not None
    if TASKS.key_of(study.task(study.model)) != "images":
        raise ModelError(
            f"{study.name} is a {type(study.model).__name__}; this search is taught by an image classifier."
        )
    return preparation_for(study.origin.config, study.origin.preprocessing())


def maker_of(study: Study, options: Synthesis) -> Maker:
    """Makes images of the teacher; refuses one that there are none of."""
    assert study.origin is not None
    return Maker(study.model, prepared_for(study), len(class_names(study.origin.config)), options)


def examples_of(study: Study, options: Synthesis) -> Sequence[Row]:
    """The data that was given, or images made of the teacher: once, a killed run goes on with them."""
    if study.data is not None:
        return study.examples(study.model).rows
    assert study.folder is not None and study.origin is not None
    folder = study.folder / "images"
    if not (folder / SYNTHESISED).exists():
        folder.mkdir(exist_ok=True)
        study.announce(f"{options.count:,} images are made of {study.name}")
        maker = maker_of(study, options)
        write_images(maker, made_in(maker, folder, study.progress), folder / SYNTHESISED)
    return study.task(study.model).load(str(folder), study.origin, study.model, 0, "calibration").rows


def split(rows: Sequence[Row], labels: Sequence[int], held: int | None, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of two parts of each class, ``held`` of it in the second, or half; in a random order.

    Raises:
        DataError: a part is empty.
    """
    order = torch.randperm(len(rows), generator=generator(seed, "search", "split")).tolist()
    of: dict[int, list[int]] = {}
    for number in order:
        of.setdefault(labels[number], []).append(number)
    second = {n for members in of.values() for n in members[: len(members) // 2 if held is None else held]}
    parts = [i for i in order if i not in second], [i for i in order if i in second]
    if not all(parts):
        raise DataError(f"{len(rows)} examples of {len(of)} classes are too few to be split; give more.")
    return parts


class Taught(Objective):
    """A student's soft cross-entropy to a teacher's answers; ``hard``: to the labels of the batch instead."""

    def __init__(self, task: Task, teacher: nn.Module, temperature: float, *, hard: bool = False) -> None:
        super().__init__(task, [], None)
        self.taught_by, self.temperature, self.hard = teacher, temperature, hard

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], progress: float) -> Tensor:
        """As of :class:`~nybble.training.objective.Objective`."""
        return self.loss(model, batch)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Of one batch, a scalar with a gradient."""
        called: Any = model
        logits = wide(called(pixel_values=batch["pixel_values"]).logits)
        if self.hard:
            return nn.functional.cross_entropy(logits, batch["labels"])
        return soft_cross_entropy(logits / self.temperature, self.answers(batch))

    @torch.no_grad()
    def answers(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The teacher's, [samples, classes]."""
        teacher: Any = self.taught_by
        given = in_its_dtype(teacher, {"pixel_values": batch["pixel_values"]})
        chances: Tensor = (teacher(**given).logits.float() / self.temperature).softmax(-1)
        return chances


class Pairs(Task):
    """A task whose examples come in twos: of one part, and of another; a batch has the first ones first."""

    summary, unit, shown = "pairs of examples", "pairs", "accuracy"

    def __init__(self, task: Task) -> None:
        self.task = task

    def claims(self, model: nn.Module) -> bool:  # noqa: D102
        return False

    def check(self, model: nn.Module, name: str, seq_len: int) -> None:  # noqa: D102
        self.task.check(model, name, seq_len)

    def load(self, src: str, origin: Any, model: nn.Module, seq_len: int, part: Any) -> Any:  # noqa: D102
        return self.task.load(src, origin, model, seq_len, part)

    def augmentation(self, line: str, rows: Sequence[Row]) -> Augment | None:  # noqa: D102
        return self.task.augmentation(line, rows)

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:  # noqa: D102
        first, second = self.task.collate(rows), self.task.collate([row["second"] for row in rows])
        return {name: torch.cat((value, second[name])) for name, value in first.items()}

    def measure(self, *given: Any) -> dict[str, float]:  # noqa: D102
        return self.task.measure(*given)

    def samples(self, *given: Any) -> list[dict[str, str]]:  # noqa: D102
        return self.task.samples(*given)


def paired(first: Sequence[Row], second: Sequence[Row]) -> list[Row]:
    """Examples of the first part, each with one of the second, which begins again where it is shorter."""
    return [{**row, "second": second[number % len(second)]} for number, row in enumerate(first)]


def halves(batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A batch of :class:`Pairs` as the two that it is made of."""
    both = {name: value.chunk(2) for name, value in batch.items()}
    return {name: value[0] for name, value in both.items()}, {name: value[1] for name, value in both.items()}


def measured_norms(model: nn.Module, task: Task, rows: Sequence[Row], batch: int, batches: int) -> None:
    """BatchNorm statistics of a network anew, of the first examples."""
    device = next(model.parameters()).device

    def run(called: Any) -> None:
        for start in range(0, min(len(rows), batch * batches), batch):
            called(pixel_values=task.collate(rows[start : start + batch])["pixel_values"].to(device))

    measure_norms(model, run)


@torch.no_grad()
def error(model: Any, task: Task, rows: Sequence[Row], labels: Tensor, batch: int) -> float:
    """Share of wrong answers of a network in eval mode; ``labels`` int64 [rows]."""
    device, wrong = next(model.parameters()).device, 0
    for start in range(0, len(rows), batch):
        pixels = task.collate(rows[start : start + batch])["pixel_values"].to(device)
        wrong += int((model(pixel_values=pixels).logits.argmax(-1).cpu() != labels[start : start + batch]).sum())
    return wrong / len(rows)
