"""Masked language models: tokens that a text has lost, of sentences.

As BERT is trained (Devlin et al. 2019, arXiv:1810.04805, section 3.1): 15 % of a sentence's tokens are asked for, of
which 80 % are the mask, 10 % another token, 10 % themselves. Which ones is drawn anew for every forward; those of
held-out sentences are always the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from nybble.core.errors import DataError, UsageError
from nybble.core.progress import Progress, task
from nybble.core.seeds import generator
from nybble.data.encoded import Encoded, digest, encoded, mask_of, padded
from nybble.data.pairs import IGNORED
from nybble.data.samples import Origin
from nybble.data.sentences import split_sentences
from nybble.data.text import Part, load_text
from nybble.models.adapter import reads_of
from nybble.nn.in_place import evaluation_mode
from nybble.training.measures import SHOWN
from nybble.training.tasks import Augment, Row, Task
from nybble.training.tasks._fits import check_length, check_tokens, padding_of

ASKED, MASKED, OTHER = 0.15, 0.8, 0.1


@dataclass(frozen=True, kw_only=True)
class Sentences(Encoded):
    """Rows have ``input_ids`` and, as many, ``asks``: 1 on what may be asked for; ``pad``, ``mask`` and ``words``."""

    @property
    def targets(self) -> int:
        """Tokens that may be asked for."""
        return sum(sum(row["asks"]) for row in self.rows)


class MaskedLanguage(Task):
    """See the module. Metrics: ``nll``, nats a token asked for, ``ppl``, its exponential, and ``accuracy``."""

    summary: ClassVar[str] = "masked language models, on sentences of a text"
    unit: ClassVar[str] = "tokens that may be masked"
    shown: ClassVar[str] = "nll"

    def claims(self, model: nn.Module) -> bool:  # noqa: D102
        named = any(kind.__name__.endswith("ForMaskedLM") for kind in type(model).__mro__)
        return named and reads_of(model) == "sentences"

    def check(self, model: nn.Module, name: str, seq_len: int) -> None:  # noqa: D102
        check_length(model, name, seq_len)

    def load(self, src: str, origin: Origin, model: nn.Module, seq_len: int, part: Part) -> Sentences:  # noqa: D102
        tokenizer: Any = origin.tokenizer()
        if tokenizer.mask_token_id is None:
            raise DataError("the model's tokenizer has no mask token, which a masked language model is trained with.")
        documents = load_text(src, part, tokenizer).documents
        texts = list(dict.fromkeys(sentence for text in documents for sentence in split_sentences(text)))
        if not texts:
            raise DataError(f"data {src!r} has no sentence of four words or more.")
        found, shortened = encoded({"text": texts}, tokenizer, seq_len)
        check_tokens(model, found["input_ids"], src)
        special, asked = set(tokenizer.all_special_ids), []
        made: Any = model
        more = {"pad": padding_of(model), "mask": tokenizer.mask_token_id, "words": made.config.vocab_size}
        for ids in found["input_ids"]:
            asks = [int(token not in special) for token in ids]
            if any(asks):
                asked.append({"input_ids": ids, "asks": asks, **more})
        return Sentences(rows=tuple(asked), source=src, sha256=digest(asked, "asks"), shortened=shortened)

    def length(self, row: Row) -> int:  # noqa: D102
        return len(row["input_ids"])

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Labels are all tokens that may be asked for, until :meth:`augmentation` chooses some."""
        ids = [row["input_ids"] for row in rows]
        inputs, may = padded(ids, rows[0]["pad"]), padded([row["asks"] for row in rows], 0)
        return {"input_ids": inputs, "attention_mask": mask_of(ids), "labels": inputs.masked_fill(may == 0, IGNORED)}

    def augmentation(self, line: str, rows: Sequence[Row]) -> Augment:
        """The masking."""
        if line:
            raise UsageError(f"augment {line!r}: {self.summary} have no augmentation but their masks; leave it out.")
        mask, words = (rows[0][name] for name in ("mask", "words"))
        return lambda batch, drawn: masked(batch, drawn, mask, words)

    def counted(self, batch: Mapping[str, Tensor], logits: Tensor) -> Tensor:  # noqa: D102
        return batch["attention_mask"].bool()

    @torch.no_grad()
    def measure(  # noqa: D102
        self, model: nn.Module, origin: Origin, rows: Sequence[Row], batch: int, progress: Progress
    ) -> dict[str, float]:
        total, right, count = 0.0, 0, 0
        starts = range(0, len(rows), batch)
        with evaluation_mode(model), task(progress, len(starts), "held-out sentences"):
            for start in starts:
                logits, labels = self._said(model, rows[start : start + batch], start)
                total += functional.cross_entropy(logits, labels, reduction="sum").item()
                right, count = right + int((logits.argmax(-1) == labels).sum()), count + len(labels)
                progress.advance()
        nll = total / count
        return {"nll": nll, "ppl": math.exp(min(nll, 700.0)), "accuracy": right / count}

    def _said(self, model: nn.Module, rows: Sequence[Row], place: int) -> tuple[Tensor, Tensor]:
        """float32 logits [tokens asked for, words], and what these are."""
        batch = self.augmentation("", rows)(self.collate(rows), generator(0, "held-out masks", str(place)))
        device = next(model.parameters()).device
        given = {name: tensor.to(device) for name, tensor in batch.items()}
        labels = given.pop("labels")
        return model(**given).logits.float()[labels != IGNORED], labels[labels != IGNORED]

    @torch.no_grad()
    def samples(self, model: nn.Module, origin: Origin, rows: Sequence[Row]) -> list[dict[str, str]]:  # noqa: D102
        tokenizer, found = origin.tokenizer(), []
        with evaluation_mode(model):
            for place, row in enumerate(rows[:SHOWN]):
                logits, labels = self._said(model, [row], place)
                ids = self.augmentation("", [row])(
                    self.collate([row]), generator(0, "held-out masks", str(place))
                )["input_ids"][0]  # fmt: skip
                found.append({
                    "prompt": str(tokenizer.decode(ids)), "text": str(tokenizer.decode(logits.argmax(-1))),
                    "target": str(tokenizer.decode(labels)),
                })  # fmt: skip
        return found


def masked(batch: Mapping[str, Tensor], drawn: torch.Generator, mask: int, words: int) -> dict[str, Tensor]:
    """A batch with some of its tokens asked for, one of each sentence at least.

    Args:
        batch: ``input_ids`` and ``labels``, int64 [sentences, tokens], ``IGNORED`` where nothing may be asked for.
        drawn: on the CPU.
        mask: the token that stands for what is asked for.
        words: how many tokens there are.
    """
    labels, device = batch["labels"], batch["labels"].device
    chance, kind = (torch.rand(labels.shape, generator=drawn).to(device) for _ in range(2))
    other = torch.randint(words, labels.shape, generator=drawn).to(device)
    chance = chance.masked_fill(labels == IGNORED, 2.0)
    asked = (chance < ASKED) | ((chance == chance.amin(1, keepdim=True)) & (chance < 2.0))
    ids = batch["input_ids"].masked_fill(asked & (kind < MASKED), mask)
    ids = torch.where(asked & (kind >= MASKED) & (kind < MASKED + OTHER), other, ids)
    return {**batch, "input_ids": ids, "labels": labels.masked_fill(~asked, IGNORED)}


PART = MaskedLanguage()
