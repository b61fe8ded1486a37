"""Text classifiers: one class of several to a text, or to two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn
from torch.nn import functional

from nybble.core.errors import ModelError
from nybble.core.progress import Progress
from nybble.data.labelled import Labelled, class_names, class_reader
from nybble.data.samples import Origin
from nybble.data.text import Part
from nybble.training.tasks import Row
from nybble.training.tasks._sequences import SequenceTask


class Classification(SequenceTask):
    """See the module. Metrics: ``loss``, mean cross-entropy in nats, and ``accuracy``, a share of the examples."""

    summary: ClassVar[str] = "text classifiers, on records with a label"
    unit: ClassVar[str] = "records"
    shown: ClassVar[str] = "accuracy"

    def claims(self, model: nn.Module) -> bool:  # noqa: D102
        return (self.width(model) or 0) > 1

    def load(self, src: str, origin: Origin, model: nn.Module, seq_len: int, part: Part) -> Labelled:  # noqa: D102
        asked: Any = model
        kind = asked.config.problem_type
        if kind not in (None, "single_label_classification"):
            raise ModelError(
                f"the model's config says problem_type {kind!r}, and classifiers are trained to one class a text; set "
                "it to 'single_label_classification', or train in a loop of your own."
            )
        return self.read(src, origin, model, class_reader(class_names(asked.config)), seq_len)

    def classes_of(self, rows: Sequence[Row]) -> list[int]:  # noqa: D102
        return [row["label"] for row in rows]

    def measure(  # noqa: D102
        self, model: nn.Module, origin: Origin, rows: Sequence[Row], batch: int, progress: Progress
    ) -> dict[str, float]:
        logits, labels = self.given(model, rows, batch, progress)
        right = (logits.argmax(-1) == labels).double().mean()
        return {"loss": functional.cross_entropy(logits.double(), labels).item(), "accuracy": right.item()}

    def samples(self, model: nn.Module, origin: Origin, rows: Sequence[Row]) -> list[dict[str, str]]:  # noqa: D102
        asked: Any = model
        names, tokenizer = class_names(asked.config), origin.tokenizer()
        return [
            {
                "prompt": str(tokenizer.decode(row["input_ids"], skip_special_tokens=True)),
                "text": names[found],
                "target": names[row["label"]],
            }
            for row, found in zip(rows, self.said(model, rows).argmax(-1).tolist(), strict=False)
        ]


PART = Classification()
