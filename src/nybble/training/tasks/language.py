"""Causal language models: the next token, of text or of the answers of instructions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nybble.core.progress import Progress
from nybble.data.instructions import Examples, collate, load_examples
from nybble.data.kinds import data_kind
from nybble.data.samples import Origin
from nybble.data.text import Part
from nybble.models.adapter import reads_of
from nybble.training.measures import answers, held_out
from nybble.training.tasks import Row, Task
from nybble.training.tasks._fits import check_length, check_tokens


class Language(Task):
    """See the module. Metrics: ``nll``, nats a target token, and ``ppl``, its exponential."""

    summary: ClassVar[str] = "causal language models, on text or instructions"
    unit: ClassVar[str] = "target tokens"
    shown: ClassVar[str] = "nll"

    def claims(self, model: nn.Module) -> bool:
        """One that goes on with text; kinds of data call speech and other series tokens, too, where no family says."""
        made: Any = model
        text = getattr(model, "main_input_name", None) == "input_ids"
        return text and reads_of(model) == "tokens" and bool(made.can_generate())

    def check(self, model: nn.Module, name: str, seq_len: int) -> None:  # noqa: D102
        check_length(model, name, seq_len)

    def load(self, src: str, origin: Origin, model: nn.Module, seq_len: int, part: Part) -> Examples:  # noqa: D102
        tokenizer: Any = data_kind("tokens").tokenizer(origin)
        found = load_examples(src, tokenizer, seq_len=seq_len, part=part)
        check_tokens(model, (row["input_ids"] for row in found.rows), src)
        return found

    def length(self, row: Row) -> int:  # noqa: D102
        return len(row["labels"])

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:  # noqa: D102
        return collate([dict(row) for row in rows])

    def counted(self, batch: Mapping[str, Tensor], logits: Tensor) -> Tensor:  # noqa: D102
        mask = batch.get("attention_mask")
        return torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device) if mask is None else mask.bool()

    def measure(  # noqa: D102
        self, model: nn.Module, origin: Origin, rows: Sequence[Row], batch: int, progress: Progress
    ) -> dict[str, float]:
        return held_out(model, [dict(row) for row in rows], batch, progress)

    def samples(self, model: nn.Module, origin: Origin, rows: Sequence[Row]) -> list[dict[str, str]]:  # noqa: D102
        return answers(model, data_kind("tokens").tokenizer(origin), [dict(row) for row in rows])


PART = Language()
