"""Texts to rows of tokens with the tokenizer's special ones, and rows to one tensor, padded on the right.

On the right, as positions may be absolute: what is of a row stays where it is.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nybble.core.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Encoded(ABC):
    """What a source came to.

    Attributes:
        rows: the examples, in order.
        source: the SRC. sha256: of all ids, and of labels.
        shortened: how many texts lost their end.
    """

    rows: tuple[dict[str, Any], ...]
    source: str
    sha256: str
    shortened: int

    @property
    @abstractmethod
    def targets(self) -> int:
        """How many things the loss is a mean of: tokens, records."""

    def manifest(self) -> dict[str, Any]:
        """What stands beside every number from these examples."""
        found = {"source": self.source, "sha256": self.sha256, "examples": len(self.rows), "targets": self.targets}
        return {**found, "shortened": self.shortened}


def digest(rows: Sequence[Mapping[str, Any]], labels: str) -> str:
    """sha256 of the ids of rows, and of what they have as ``labels``."""
    return hashlib.sha256(repr([(row["input_ids"], row[labels]) for row in rows]).encode()).hexdigest()


def encoded(
    texts: Mapping[str, Sequence[str]], tokenizer: PreTrainedTokenizerBase, seq_len: int
) -> tuple[dict[str, list[list[int]]], int]:
    """Tokens of texts, special ones included.

    Args:
        texts: by the tokenizer's argument: ``text``, perhaps with ``text_pair``; or ``text_target``.
        tokenizer: of the model.
        seq_len: most tokens of a row; of two texts the longer loses its end first.

    Returns:
        what the tokenizer makes, by name (``input_ids`` ...), a list a row; and how many rows were cut.

    Raises:
        UsageError: a length without room for a word.
    """
    if seq_len <= tokenizer.num_special_tokens_to_add(pair="text_pair" in texts):
        raise UsageError(f"a sequence length of {seq_len} leaves no room beside this tokenizer's special tokens.")
    given: dict[str, Any] = {side: list(each) for side, each in texts.items()}
    found = {name: list(rows) for name, rows in tokenizer(**given, verbose=False).items()}
    long = [i for i, ids in enumerate(found["input_ids"]) if len(ids) > seq_len]
    if long:
        given = {side: [each[i] for i in long] for side, each in texts.items()}
        for name, rows in tokenizer(**given, truncation=True, max_length=seq_len).items():
            for i, row in zip(long, rows, strict=True):
                found[name][i] = row
    return found, len(long)


def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """int64 [rows, longest], ``value`` behind the ends."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], dtype=torch.int64)


def mask_of(rows: Sequence[Sequence[int]]) -> Tensor:
    """int64 of the same shape: 1 on what is of a row, 0 on padding."""
    return padded([[1] * len(row) for row in rows], 0)
