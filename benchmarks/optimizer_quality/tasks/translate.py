"""Translation: strings of LibreOffice's user interface, English to German, Spanish, French and Romanian."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.optimizer_quality.models import Translator
from benchmarks.optimizer_quality.pack import PAD, SENTENCE, WORDS, padded
from benchmarks.optimizer_quality.tasks import Plan, Task
from torch import Tensor, nn

END = WORDS  # behind the vocabulary: the end, then each language's first word
IGNORED = -100


class Strings(Task):
    """A target begins with its language; all translations of an English string are trained on, or none."""

    title, unit, arrays = "translation", "nats a token", ("pairs.",)
    plan = Plan(
        width=256, layers=3, heads=4, context=SENTENCE + 1, steps=1600, batch=256,
        rate=1e-3, decay=0.05, betas=(0.9, 0.98), dropout=0.1, seconds=15,
    )  # fmt: skip

    def load(self, arrays: dict[str, Any]) -> None:  # noqa: D102
        held = torch.from_numpy(arrays["pairs.held"])
        source, target = (torch.from_numpy(padded(arrays, f"pairs.{name}", SENTENCE)) for name in ("en", "to"))
        first = END + 1 + torch.from_numpy(arrays["pairs.language"]).long()[:, None]
        given = torch.cat([first, target], dim=1)
        lengths = torch.from_numpy(arrays["pairs.to.lengths"].astype("int64"))[:, None]
        asked = torch.cat([target, torch.zeros_like(first)], dim=1).scatter(1, lengths, END)
        asked = asked.masked_fill(torch.arange(SENTENCE + 1) > lengths, IGNORED)
        parts = [part.to(self.device) for part in (source, given, asked)]
        held = held.to(self.device)
        self.train = [part[~held] for part in parts]
        self.held = [part[held][: self.p.judged] for part in parts]

    def model(self) -> nn.Module:  # noqa: D102
        p, words = self.p, END + 1 + len(self.about["languages"])
        return Translator(words, p.width, p.heads, p.layers, SENTENCE + 1, p.dropout)

    def batches(self, seed: int) -> Iterator[tuple[Tensor, ...]]:  # noqa: D102
        for index in self.order(len(self.train[0]), seed):
            yield tuple(part[index] for part in self.train)

    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor:  # noqa: D102
        source, given, asked = batch
        return F.cross_entropy(model(source, given, PAD).flatten(0, 1), asked.flatten(), ignore_index=IGNORED)

    def held_out(self, model: nn.Module) -> dict[str, float]:  # noqa: D102
        total, count = 0.0, 0
        for batch in zip(*(torch.split(part, 256) for part in self.held), strict=True):
            tokens = int((batch[2] != IGNORED).sum())
            total, count = total + float(self.loss(model, *batch)) * tokens, count + tokens
        return {"loss": total / count}


TASK = Strings
