"""Encoder-decoders that turn one text into another: translation, summaries.

BLEU is sacrebleu's over a whole held-out set (``nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp``), of what the search
finds that the model's own generation config describes: its beams, its forced tokens, its penalties; nothing is drawn.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from nybble.core.errors import UsageError
from nybble.core.progress import Progress, task
from nybble.data.pairs import IGNORED
from nybble.data.parallel import Parallel, collate, load_parallel
from nybble.data.samples import Origin
from nybble.data.text import Part
from nybble.models.adapter import reads_of
from nybble.nn.in_place import evaluation_mode
from nybble.training.measures import SHOWN, longest
from nybble.training.tasks import Row, Task
from nybble.training.tasks._fits import check_length, check_tokens, padding_of

ROOM = 2
"""A text that is generated ends, where the config names no length, at this many times the longest target's tokens."""


class Translation(Task):
    """See the module. Metrics: ``nll``, nats a target token, ``ppl``, its exponential, and ``bleu``, 0 to 100."""

    summary: ClassVar[str] = "encoder-decoders, on pairs of source and target"
    unit: ClassVar[str] = "target tokens"
    shown: ClassVar[str] = "bleu"

    def claims(self, model: nn.Module) -> bool:  # noqa: D102
        made: Any = model
        return reads_of(model) == "pairs" and bool(made.can_generate())

    def check(self, model: nn.Module, name: str, seq_len: int) -> None:  # noqa: D102
        check_length(model, name, seq_len)
        if find_spec("sacrebleu") is None:  # before hours of training, at whose end it is missed
            raise UsageError("a model that translates is judged by sacrebleu: pip install 'nybble[train]'")

    def load(self, src: str, origin: Origin, model: nn.Module, seq_len: int, part: Part) -> Parallel:  # noqa: D102
        found = load_parallel(src, origin.tokenizer(), seq_len=seq_len, pad=padding_of(model))
        for side in ("input_ids", "labels"):
            check_tokens(model, (row[side] for row in found.rows), src)
        return found

    def length(self, row: Row) -> int:  # noqa: D102
        return max(len(row["input_ids"]), len(row["labels"]))

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:  # noqa: D102
        return collate(rows)

    def counted(self, batch: Mapping[str, Tensor], logits: Tensor) -> Tensor:  # noqa: D102
        return batch["labels"] != IGNORED

    @torch.no_grad()
    def measure(  # noqa: D102
        self, model: nn.Module, origin: Origin, rows: Sequence[Row], batch: int, progress: Progress
    ) -> dict[str, float]:
        import sacrebleu

        alike = sorted(rows, key=self.length)
        parts = [alike[start : start + batch] for start in range(0, len(alike), batch)]
        total, count, texts = 0.0, 0, list[str]()
        with evaluation_mode(model), task(progress, len(parts), "held-out texts"):
            for part in parts:
                lost, tokens = self._lost(model, part)
                total, count = total + lost, count + tokens
                texts += self._texts(model, origin, part)
                progress.advance()
        nll = total / count
        bleu = sacrebleu.corpus_bleu(texts, [[row["target"] for row in alike]]).score
        return {"nll": nll, "ppl": math.exp(min(nll, 700.0)), "bleu": bleu}

    @torch.no_grad()
    def samples(self, model: nn.Module, origin: Origin, rows: Sequence[Row]) -> list[dict[str, str]]:  # noqa: D102
        shown = rows[:SHOWN]
        with evaluation_mode(model):
            texts = self._texts(model, origin, shown)
        return [
            {"prompt": row["source"], "text": text, "target": row["target"]}
            for row, text in zip(shown, texts, strict=True)
        ]

    def _lost(self, model: nn.Module, rows: Sequence[Row]) -> tuple[float, int]:
        """Of some examples, the sum of their target tokens' losses, and how many these are."""
        device = next(model.parameters()).device
        given = {name: t.to(device) for name, t in self.collate(rows).items()}
        logits, labels = model(**given).logits.float(), given["labels"].flatten()
        lost = functional.cross_entropy(logits.flatten(0, 1), labels, ignore_index=IGNORED, reduction="sum")
        return lost.item(), int((labels != IGNORED).sum())

    def _texts(self, model: Any, origin: Origin, rows: Sequence[Row]) -> list[str]:
        """What the model makes of sources."""
        device = next(model.parameters()).device
        given = {name: t.to(device) for name, t in self.collate(rows).items() if name != "labels"}
        made = model.generate(**given, generation_config=_search(model, rows))
        return [str(text) for text in origin.tokenizer().batch_decode(made, skip_special_tokens=True)]


def _search(model: Any, rows: Sequence[Row]) -> Any:
    """The model's generation config, with an end, and without a draw."""
    found = copy.deepcopy(model.generation_config)
    found.do_sample = False
    if found.max_length is None and found.max_new_tokens is None:
        most = ROOM * max(len(row["labels"]) for row in rows)
        found.max_new_tokens = min(most, (longest(model.config) or most + 1) - 1)
    return found


PART = Translation()
