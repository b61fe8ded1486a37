"""What tasks share whose models give one answer to a whole text."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.progress import Progress, task
from nybble.data.labelled import Labelled, Read, collate, load_labelled
from nybble.data.samples import Origin
from nybble.models.adapter import TEXTS, reads_of
from nybble.nn.in_place import evaluation_mode
from nybble.training.measures import SHOWN
from nybble.training.tasks import Row, Task
from nybble.training.tasks._fits import check_length, check_tokens, padding_of


class SequenceTask(Task):
    """Of a model ``...ForSequenceClassification``, as transformers calls them all."""

    def width(self, model: nn.Module) -> int | None:
        """How many numbers the model gives to a text; None where it is another kind of model."""
        named = any(kind.__name__.endswith("ForSequenceClassification") for kind in type(model).__mro__)
        config: Any = getattr(model, "config", None)
        return int(config.num_labels) if named and reads_of(model) in TEXTS else None

    def check(self, model: nn.Module, name: str, seq_len: int) -> None:
        check_length(model, name, seq_len)

    def read(self, src: str, origin: Origin, model: nn.Module, read: Read, seq_len: int) -> Labelled:
        """Labelled examples that fit the model."""
        arguments = [*inspect.signature(model.forward).parameters]
        found = load_labelled(
            src, origin.tokenizer(), read, seq_len=seq_len, pad=padding_of(model), arguments=arguments
        )
        check_tokens(model, (row["input_ids"] for row in found.rows), src)
        return found

    def length(self, row: Row) -> int:
        return len(row["input_ids"])

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        return collate(rows)

    def given(self, model: nn.Module, rows: Sequence[Row], batch: int, progress: Progress) -> tuple[Tensor, Tensor]:
        """What the model gives to rows, float32 [rows, numbers], and their labels, both on the CPU."""
        with task(progress, -(-len(rows) // batch), "held-out examples"):
            parts = [(logits.cpu(), labels) for logits, labels in self._batches(model, rows, batch, progress)]
        logits, labels = (torch.cat(each) for each in zip(*parts, strict=True))
        return logits, labels

    def said(self, model: nn.Module, rows: Sequence[Row]) -> Tensor:
        """What the model gives to the examples that are shown, float32 [rows, numbers]."""
        ((logits, _),) = self._batches(model, rows[:SHOWN], SHOWN, None)
        return logits

    @torch.no_grad()
    def _batches(
        self, model: nn.Module, rows: Sequence[Row], batch: int, progress: Progress | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        device = next(model.parameters()).device
        for start in range(0, len(rows), batch):
            inputs = self.collate(rows[start : start + batch])
            labels = inputs.pop("labels")
            with evaluation_mode(model):
                yield model(**{name: t.to(device) for name, t in inputs.items()}).logits.float(), labels
            if progress is not None:
                progress.advance()
