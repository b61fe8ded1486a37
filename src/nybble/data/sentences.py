"""Documents to padded sentences with the tokenizer's special tokens: what encoders read.

A line of a document is a paragraph; it is cut behind ``.``, ``!`` and ``?`` that a blank and a capital follow.
Sentences of fewer than four words are left out; those longer than the length asked for are cut off.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from nybble.core.errors import DataError, UsageError
from nybble.data.tokens import TextSamples, check_count, ids_sha256, pick

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nybble.data.text import TextSource

_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9\"'(])")
_WORDS = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class SentenceSamples(TextSamples):
    """Sentences for calibration or evaluation, of which the shorter ones are padded.

    Attributes:
        attention_mask: int64 [samples, seq_len], 1 on tokens and 0 on padding.
    """

    attention_mask: Tensor

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a model is called with."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    def manifest(self) -> dict[str, str | int]:
        """With how many tokens are no padding."""
        return {**super().manifest(), "tokens": self.tokens}


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, as the module says."""
    found = [" ".join(part.split()) for line in text.splitlines() for part in _END.split(line)]
    return [sentence for sentence in found if len(sentence.split()) >= _WORDS]


def sentence_samples(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int | None,
    seq_len: int,
    seed: int | None = None,
    fewer: bool = False,
) -> SentenceSamples:
    """Pick sentences of a source.

    Args:
        source: the documents.
        tokenizer: of the model to be fed; it needs a padding token.
        samples: how many; None takes all, in order (evaluation).
        seq_len: tokens of the longest; what is longer is cut off.
        seed: None picks evenly spread ones, in order; a number picks at random without replacement.
        fewer: take what there is where that is fewer than ``samples``, instead of raising.

    Raises:
        UsageError: samples < 1 or seq_len < 2. DataError: too few sentences, or a tokenizer without padding.
    """
    if seq_len < 2:
        raise UsageError(f"a sequence length of {seq_len} leaves no room for a word. Give 2 or more.")
    check_count(samples)
    if tokenizer.pad_token_id is None:
        raise DataError("the model's tokenizer has no padding token, so its sentences can't be put into one batch.")
    sentences = list(dict.fromkeys(s for document in source.documents for s in split_sentences(document)))
    available = len(sentences)
    wanted = available if samples is None or (fewer and samples > available) else samples
    if wanted > available or not available:
        raise DataError(
            f"data {source.name!r} has {available} sentences of {_WORDS} words or more, fewer than the "
            f"{max(1, wanted)} asked for. Ask for fewer, or give more text."
        )
    chosen = [sentences[i] for i in pick(available, wanted, seed).tolist()]
    made = tokenizer(chosen, truncation=True, max_length=seq_len, padding=True, return_tensors="pt")
    input_ids, mask = made["input_ids"], made["attention_mask"]
    return SentenceSamples(
        input_ids=input_ids,
        attention_mask=mask,
        sha256=ids_sha256(input_ids),
        tokens=int(mask.sum()),
        available=available,
        source=source.name,
        source_sha256=source.sha256,
        note=source.note,
    )
