"""Documents to sequences of tokens of one length.

All documents make one stream: each is tokenized by itself without special tokens, and the end-of-sequence token stands
between two. The stream is cut into windows that don't overlap; a last piece shorter than a window is left out. Where
the tokenizer itself starts a text with a beginning-of-sequence token (Llama 2, Gemma), every window starts with that
token, for such models are lost without it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nybble.core.errors import DataError, UsageError
from nybble.core.seeds import generator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nybble.data.text import TextSource


@dataclass(frozen=True, kw_only=True, eq=False)
class TextSamples:
    """What samples of any kind of text are, and where they come from.

    Attributes:
        input_ids: int64 [samples, seq_len].
        sha256: of input_ids, of pairs then labels, row by row, as little-endian 64-bit integers.
        tokens: how many there are, padding left out.
        available: how many samples of this length the source has.
        source: SRC; source_sha256 and note: see TextSource.
    """

    input_ids: Tensor
    sha256: str
    tokens: int
    available: int
    source: str
    source_sha256: str
    note: str

    def manifest(self) -> dict[str, str | int]:
        """What a manifest or a report states beside every number from these samples."""
        samples, seq_len = self.input_ids.shape
        return {
            "source": self.source,
            "note": self.note,
            "source_sha256": self.source_sha256,
            "tokens_sha256": self.sha256,
            "samples": samples,
            "seq_len": seq_len,
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenSamples(TextSamples):
    """Sequences for calibration or evaluation; none is padded."""

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a model is called with."""
        return {"input_ids": self.input_ids}


def token_samples(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int | None,
    seq_len: int,
    seed: int | None = None,
    fewer: bool = False,
) -> TokenSamples:
    """Cut a source into sequences and pick some.

    Args:
        source: the documents.
        tokenizer: of the model to be fed.
        samples: how many sequences; None takes all, in order (evaluation).
        seq_len: tokens in each, at least 2.
        seed: None picks sequences spread evenly over the source, in order. A number picks at random without
            replacement, in random order; the caller's global random state is untouched.
        fewer: take what there is where that is fewer than ``samples``, instead of raising.

    Raises:
        UsageError: samples < 1 or seq_len < 2.
        DataError: less text than one sequence, or fewer sequences than asked for; names both numbers.
    """
    if seq_len < 2:
        raise UsageError(f"a sequence length of {seq_len} leaves no token to predict. Give 2 or more.")
    check_count(samples)
    windows = _windows(token_stream(source, tokenizer), starts_with_bos(tokenizer), source, seq_len)
    available = windows.shape[0]
    wanted = available if samples is None or (fewer and samples > available) else samples
    if wanted > available:
        raise DataError(
            f"data {source.name!r} has {available} sequences of {seq_len} tokens, fewer than the {wanted} asked for."
            f" Ask for {available} or fewer, for shorter ones, or give more text."
        )
    input_ids = windows[pick(available, wanted, seed)].contiguous()
    return TokenSamples(
        input_ids=input_ids,
        sha256=ids_sha256(input_ids),
        tokens=input_ids.numel(),
        available=available,
        source=source.name,
        source_sha256=source.sha256,
        note=source.note,
    )


def token_stream(source: TextSource, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """All documents as one run of tokens [T], with the end-of-sequence token, if there is one, between two."""
    between = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    # verbose=False: no warning that a document is longer than the model's context; it is about to be cut.
    encoded = tokenizer(list(source.documents), add_special_tokens=False, verbose=False)["input_ids"]
    stream: list[int] = []
    for number, ids in enumerate(encoded):
        stream += between if number else []
        stream += ids
    return torch.tensor(stream, dtype=torch.int64)


def starts_with_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that this tokenizer puts before any text, if it is its beginning-of-sequence token."""
    first = tokenizer("a")["input_ids"][:1]
    return first if first and first[0] == tokenizer.bos_token_id else []


def _windows(stream: Tensor, bos: list[int], source: TextSource, seq_len: int) -> Tensor:
    """Cut [T] into [available, seq_len], every window behind the bos."""
    length = seq_len - len(bos)
    count = stream.numel() // length
    if count == 0:
        longest = stream.numel() + len(bos)
        shorter = f", or a sequence length of at most {longest}" if longest > 1 else ""
        raise DataError(
            f"data {source.name!r} has {stream.numel()} tokens, fewer than one sequence of {length} text tokens."
            f" Give more text{shorter}."
        )
    body = stream[: count * length].view(count, length)
    return torch.cat([torch.tensor(bos, dtype=torch.int64).expand(count, len(bos)), body], dim=1)


def check_count(samples: int | None) -> None:
    """Raise UsageError for a number of samples below 1."""
    if samples is not None and samples < 1:
        raise UsageError(f"{samples} samples were asked for. Give 1 or more, or none for all there are.")


def ids_sha256(input_ids: Tensor) -> str:
    """sha256 of token ids, row by row, as little-endian 64-bit integers."""
    return hashlib.sha256(input_ids.numpy().astype("<i8", copy=False).tobytes()).hexdigest()


def pick(available: int, wanted: int, seed: int | None) -> Tensor:
    """Which of the available samples to take: evenly spread ones, or with a seed random ones; int64 [wanted]."""
    if seed is None:
        return torch.arange(wanted) * available // wanted
    return torch.randperm(available, generator=generator(seed, "data", "samples"))[:wanted]
