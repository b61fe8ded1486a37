"""Text classification: the section of the archive that a Debian package belongs to, by its description."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.optimizer_quality.models import TextEncoder
from benchmarks.optimizer_quality.pack import DESCRIPTION, padded
from benchmarks.optimizer_quality.tasks import Plan, Task
from torch import Tensor, nn


class Sections(Task):
    """The first 96 tokens of a description; packages of the same source are all trained on or all held out."""

    title, unit, arrays = "text classification", "nats a description", ("packages.",)
    plan = Plan(
        width=256, layers=4, heads=4, context=DESCRIPTION, steps=1150, batch=256,
        rate=1e-3, decay=0.05, betas=(0.9, 0.999), dropout=0.1, seconds=12,
    )  # fmt: skip

    def load(self, arrays: dict[str, Any]) -> None:  # noqa: D102
        held = torch.from_numpy(arrays["packages.held"])
        ids = torch.from_numpy(padded(arrays, "packages.description", DESCRIPTION)).to(torch.int32)
        labels = torch.from_numpy(arrays["packages.section"]).long()
        self.ids, self.labels = ids[~held].to(self.device), labels[~held].to(self.device)
        self.held = ids[held][: self.p.judged].to(self.device), labels[held][: self.p.judged].to(self.device)

    def model(self) -> nn.Module:  # noqa: D102
        p, classes = self.p, len(self.about["sections"])
        return TextEncoder(self.about["vocabulary"], p.width, p.heads, p.layers, DESCRIPTION, classes, p.dropout)

    def batches(self, seed: int) -> Iterator[tuple[Tensor, ...]]:  # noqa: D102
        for index in self.order(len(self.ids), seed):
            yield self.ids[index].long(), self.labels[index]

    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor:  # noqa: D102
        ids, labels = batch
        return F.cross_entropy(model(ids), labels)

    def held_out(self, model: nn.Module) -> dict[str, float]:  # noqa: D102
        ids, labels = self.held
        logits = torch.cat([model(part.long()).float() for part in ids.split(512)])
        accuracy = (logits.argmax(1) == labels).float().mean()
        return {"loss": float(F.cross_entropy(logits, labels)), "accuracy": float(accuracy)}


TASK = Sections
