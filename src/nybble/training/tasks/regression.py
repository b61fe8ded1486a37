"""Heads that give one number to a text, or to two: similarity, ratings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from nybble.core.errors import ModelError
from nybble.core.progress import Progress
from nybble.data.labelled import Labelled, number
from nybble.data.samples import Origin
from nybble.data.text import Part
from nybble.training.tasks import Row
from nybble.training.tasks._sequences import SequenceTask


class Regression(SequenceTask):
    """See the module.

    Metrics: ``loss``, the mean squared error in the labels' units, and ``pearson``, the correlation, 0 where either
    side is constant.
    """

    summary: ClassVar[str] = "models that give one number to a text, on records with a number for a label"
    unit: ClassVar[str] = "records"
    shown: ClassVar[str] = "loss"

    def claims(self, model: nn.Module) -> bool:  # noqa: D102
        return self.width(model) == 1

    def load(self, src: str, origin: Origin, model: nn.Module, seq_len: int, part: Part) -> Labelled:  # noqa: D102
        asked: Any = model
        kind = asked.config.problem_type
        if kind not in (None, "regression"):
            raise ModelError(
                f"the model's config says problem_type {kind!r}, and its head gives one number, which is trained to "
                "numbers; set it to 'regression', or take a model with a class each."
            )
        return self.read(src, origin, model, number, seq_len)

    def measure(  # noqa: D102
        self, model: nn.Module, origin: Origin, rows: Sequence[Row], batch: int, progress: Progress
    ) -> dict[str, float]:
        logits, labels = self.given(model, rows, batch, progress)
        found, wanted = logits[:, 0].double(), labels.double()
        pearson = torch.nan_to_num(functional.cosine_similarity(found - found.mean(), wanted - wanted.mean(), 0))
        return {"loss": functional.mse_loss(found, wanted).item(), "pearson": pearson.item()}

    def samples(self, model: nn.Module, origin: Origin, rows: Sequence[Row]) -> list[dict[str, str]]:  # noqa: D102
        tokenizer = origin.tokenizer()
        return [
            {
                "prompt": str(tokenizer.decode(row["input_ids"], skip_special_tokens=True)),
                "text": f"{found:.4g}",
                "target": f"{row['label']:.4g}",
            }
            for row, found in zip(rows, self.said(model, rows)[:, 0].tolist(), strict=False)
        ]


PART = Regression()
