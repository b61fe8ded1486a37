"""Documents to pairs of sequences, an input and its target: what encoder-decoders read.

A source may say what the target of each document is (:mod:`nybble.data.rows`): both are cut off at the length asked
for, and padded on the right. Otherwise the stream of tokens of :mod:`nybble.data.tokens` is cut into pieces of two
sequences: the first is the input, the target is how the text goes on. Both get the special tokens that the tokenizer
puts around an input and around a target, and all have one length, so nothing is padded.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nybble.core.errors import DataError, UsageError
from nybble.data.tokens import TextSamples, check_count, ids_sha256, pick, token_stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nybble.data.text import TextSource

IGNORED = -100
"""A label that stands for no target, as transformers' losses have it."""
Around = tuple[list[int], list[int]]


@dataclass(frozen=True, kw_only=True, eq=False)
class PairSamples(TextSamples):
    """Inputs and targets for calibration or evaluation; ``sha256`` is of input_ids and then labels.

    Attributes:
        labels: int64 [samples, length of targets]; ``IGNORED`` behind their ends.
        attention_mask: of input_ids' shape, 0 on padding; None where nothing is padded.
        decoder_input_ids: what a decoder reads to predict the targets; None until a model has made them, each family in
            its own way (:meth:`nybble.data.kinds.DataKind.fitted`).
    """

    labels: Tensor
    attention_mask: Tensor | None = None
    decoder_input_ids: Tensor | None = None

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a model is called with."""
        known = self.decoder_input_ids
        found = {"input_ids": self.input_ids, **({"labels": self.labels} if known is None else {})}
        if self.attention_mask is not None:
            found["attention_mask"] = self.attention_mask
        if known is not None:
            found["decoder_input_ids"] = known
        if known is not None and self.attention_mask is not None:
            found["decoder_attention_mask"] = (self.labels != IGNORED).long()
        return found

    def manifest(self) -> dict[str, str | int]:
        """With what the targets are."""
        given = self.attention_mask is not None
        return {**super().manifest(), "targets": "given with the text" if given else "how the text goes on"}


def pair_samples(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int | None,
    seq_len: int,
    seed: int | None = None,
    fewer: bool = False,
) -> PairSamples:
    """Cut a source into pairs and pick some.

    Args:
        source: the documents.
        tokenizer: of the model to be fed.
        samples: how many pairs; None takes all, in order (evaluation).
        seq_len: tokens of an input, and of a target (of the longest, where the source gives targets); both include
            special tokens.
        seed: None picks pairs spread evenly over the source, in order; a number picks at random without replacement.
        fewer: take what there is where that is fewer than ``samples``, instead of raising.

    Raises:
        UsageError: samples < 1, or sequences with room for nothing but special tokens.
        DataError: less text than one pair, or fewer pairs than asked for; names both numbers. Targets of some documents
            only, or a tokenizer that can't pad them.
    """
    check_count(samples)
    if source.targets:
        return _given_pairs(source, tokenizer, samples, seq_len, seed, fewer)
    around = _around(tokenizer, "text"), _around(tokenizer, "text_target")
    lengths = [seq_len - len(before) - len(behind) for before, behind in around]
    if min(lengths) < 1:
        raise UsageError(f"a sequence length of {seq_len} leaves no room beside this tokenizer's special tokens.")
    stream = token_stream(source, tokenizer)
    available = stream.numel() // sum(lengths)
    wanted = _wanted(source, available, samples, fewer, f" of {seq_len} tokens")
    pieces = stream[: available * sum(lengths)].view(available, -1)[pick(available, wanted, seed)]
    bodies = pieces[:, : lengths[0]], pieces[:, lengths[0] :]
    input_ids, labels = (_framed(body, *frame) for body, frame in zip(bodies, around, strict=True))
    return _made(source, available, input_ids, labels, None)


def _given_pairs(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    samples: int | None,
    seq_len: int,
    seed: int | None,
    fewer: bool,
) -> PairSamples:
    """Documents with the targets that the source has for them."""
    available = len(source.documents)
    if not all(source.targets):
        lacking = sum(not target for target in source.targets)
        raise DataError(
            f"data {source.name!r} has no target for {lacking} of {available} records; give one to each, or to none."
        )
    if tokenizer.pad_token_id is None:
        raise DataError("the model's tokenizer has no padding token, so its targets can't be put into one batch.")
    if seq_len < 2:
        raise UsageError(f"a sequence length of {seq_len} leaves no room for a word. Give 2 or more.")
    wanted = _wanted(source, available, samples, fewer, "")
    rows = pick(available, wanted, seed).tolist()
    form: dict[str, Any] = {
        "truncation": True, "max_length": seq_len, "padding": True, "padding_side": "right", "return_tensors": "pt",
    }  # fmt: skip
    texts = tokenizer([source.documents[row] for row in rows], **form)
    targets = tokenizer(text_target=[source.targets[row] for row in rows], **form)
    labels = targets["input_ids"].masked_fill(targets["attention_mask"] == 0, IGNORED)
    if labels.shape[1] == texts["input_ids"].shape[1]:  # by its length a tensor shows which of the two it is of
        labels = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)
    return _made(source, available, texts["input_ids"], labels, texts["attention_mask"])


def _wanted(source: TextSource, available: int, samples: int | None, fewer: bool, size: str) -> int:
    """How many pairs to take of those that there are."""
    wanted = available if samples is None or (fewer and samples > available) else samples
    if wanted > available or not available:
        raise DataError(
            f"data {source.name!r} has {available} pairs of inputs and targets{size}, fewer than the "
            f"{max(1, wanted)} asked for. Ask for fewer or shorter ones, or give more text."
        )
    return wanted


def _made(source: TextSource, available: int, input_ids: Tensor, labels: Tensor, mask: Tensor | None) -> PairSamples:
    return PairSamples(
        input_ids=input_ids,
        labels=labels,
        attention_mask=mask,
        sha256=hashlib.sha256((ids_sha256(input_ids) + ids_sha256(labels)).encode()).hexdigest(),
        tokens=input_ids.numel() if mask is None else int(mask.sum()),
        available=available,
        source=source.name,
        source_sha256=source.sha256,
        note=source.note,
    )


def _around(tokenizer: PreTrainedTokenizerBase, side: str) -> Around:
    """The special tokens before and behind a text of one side, ``text`` or ``text_target``."""
    with_them = list(tokenizer(**{side: "a"})["input_ids"])
    bare = list(tokenizer(**{side: "a"}, add_special_tokens=False)["input_ids"])
    starts = [i for i in range(len(with_them) - len(bare) + 1) if with_them[i : i + len(bare)] == bare]
    start = starts[0] if bare and starts else 0
    return with_them[:start], with_them[start + len(bare) :]


def _framed(body: Tensor, before: list[int], behind: list[int]) -> Tensor:
    """[pairs, n] between the same tokens in every row."""
    rows = [torch.tensor(ids, dtype=torch.int64).expand(len(body), len(ids)) for ids in (before, behind)]
    return torch.cat([rows[0], body, rows[1]], 1).contiguous()
