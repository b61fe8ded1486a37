"""What searches of an image classifier share: options, the examples, the network that is found and trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from nybble.core.errors import ModelError
from nybble.core.options import at_least_one
from nybble.core.seeds import derive_seed
from nybble.search.architectures import Architecture, Study, Training
from nybble.search.choices.teaching import Taught, examples_of, maker_of, measured_norms, prepared_for
from nybble.training.norms import running_norms
from nybble.training.synthesis.options import Synthesis
from nybble.training.tasks import Row

MACS = {"macs": "multiply-accumulates"}
"""Papers of these searches call them FLOPs."""


@dataclass(frozen=True, kw_only=True)
class ImageSearch(Architecture):
    """Options of all of them.

    Attributes:
        temperature: of the teacher's answers, and of the student's.
        hard: the labels of the data teach, and not the teacher.
        synthesis: how images are made of the teacher where no data is given.
        batch: images of a forward that measures BatchNorms or judges. norm_batches: of them for the BatchNorms.
        retrain: of what is found, from random weights. retrain_on: a SRC, whose labels teach it; empty: it learns from
            what the search learned from.
    """

    budgets: ClassVar[Mapping[str, str]] = MACS
    temperature: float = 3.0
    hard: bool = False
    synthesis: Synthesis = field(default_factory=Synthesis)
    batch: int = 128
    norm_batches: int = 8
    retrain: Training = field(default_factory=Training)
    retrain_on: str = ""

    def __post_init__(self) -> None:
        at_least_one(batch=self.batch, norm_batches=self.norm_batches)

    def check(self, study: Study) -> None:
        """The teacher, and the data or what is made in its place."""
        prepared_for(study)
        if study.data is None:
            maker_of(study, self.synthesis)
            if not running_norms(study.model):
                raise ModelError(
                    f"{study.name} is a {type(study.model).__name__} without BatchNorms, so no images can be "
                    "made of it; give --data SRC, or another teacher."
                )
        else:
            study.examples(study.model)
        if study.judged_on is not None:
            study.held_out(study.model)
        if self.retrain_on:
            self._labelled(study)

    def config_of(self, study: Study) -> dict[str, Any]:
        """What a network takes of the teacher's config: images and classes."""
        wants, config = prepared_for(study), study.model.config
        return {
            "num_channels": wants.channels, "image_size": [wants.height, wants.width],
            "id2label": dict(config.id2label), "label2id": dict(config.label2id),
        }  # fmt: skip

    def teacher(self, study: Study) -> Taught:
        """What networks are told."""
        return Taught(study.task(study.model), study.model, self.temperature, hard=self.hard)

    def rows(self, study: Study) -> Sequence[Row]:
        """Examples of the search."""
        return examples_of(study, self.synthesis)

    def labels(self, study: Study, rows: Sequence[Row]) -> Tensor:
        """The class of each example, int64 [rows]: to the teacher, or as the data has it."""
        task = study.task(study.model)
        if self.hard:
            return torch.tensor(task.classes_of(rows))
        told, found = self.teacher(study), list[Tensor]()
        for start in range(0, len(rows), self.batch):
            given = task.collate(rows[start : start + self.batch])["pixel_values"].to(study.device)
            found.append(told.answers({"pixel_values": given}).argmax(-1).cpu())
        return torch.cat(found)

    def finished(self, study: Study, model: Any, rows: Sequence[Row]) -> dict[str, float]:
        """Train what was found; what it says of held-out examples, where there are any.

        Args:
            study: of the search.
            model: with random weights, on the study's device.
            rows: examples of the search.
        """
        objective: Taught | None = self.teacher(study)
        task = study.task(study.model)
        if self.retrain_on:
            rows, objective = self._labelled(study), None
        study.train("retrain", model, rows, self.retrain, objective=objective)
        measured_norms(model, task, rows, self.batch, self.norm_batches)
        if study.judged_on is None:
            return {}
        return study.judge(model, study.held_out(study.model).rows)

    def _labelled(self, study: Study) -> Sequence[Row]:
        """What ``retrain_on`` names."""
        assert study.origin is not None
        task = study.task(study.model)
        return task.load(self.retrain_on, study.origin, study.model, study.seq_len, "calibration").rows


def seeded(study: Study, name: str) -> None:
    """Random weights of networks are drawn of the study's seed."""
    torch.manual_seed(derive_seed(study.seed, "search", "weights", name) % 2**63)
