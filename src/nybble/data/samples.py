"""What is asked of data, what the model's place offers for it, and what comes out: samples ready for the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from nybble.core.errors import UsageError
from nybble.data.text import Part

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


class Samples(Protocol):
    """What a model can be calibrated or judged on; a caller may bring an object of their own."""

    @property
    def inputs(self) -> Mapping[str, Tensor]:
        """What a model is called with, by argument, the main one first; the first dimension counts samples."""

    @property
    def tokens(self) -> int:
        """How many vectors a layer sees, about: padding left out."""

    @property
    def available(self) -> int:
        """How many samples the source has."""

    @property
    def source(self) -> str:
        """SRC."""

    def manifest(self) -> Mapping[str, Any]:
        """What stands beside every number from these samples: a source, ``samples``, a ``..._sha256``."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which samples of a source.

    Attributes:
        part: what they are for; ``builtin`` has a half for each.
        samples: how many; None takes all, in order.
        seq_len: tokens of one, where samples have tokens.
        seed: None picks evenly spread ones, in order; a number picks at random without replacement.
        fewer: take what there is where that is fewer than ``samples``, instead of raising.
    """

    part: Part
    samples: int | None
    seq_len: int
    seed: int | None = None
    fewer: bool = False


def patches(pixels: Tensor) -> int:
    """About how many vectors a layer sees of images [samples, channels, height, width]: 16 x 16 pixels are one."""
    samples, _, height, width = pixels.shape
    return samples * (1 + max(1, height // 16) * max(1, width // 16))


class Origin(Protocol):
    """The place that a model comes from, as far as data needs it: every source of models is one."""

    @property
    def config(self) -> Any:
        """The transformers config."""

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that belongs to the model."""

    def preprocessing(self) -> dict[str, Any]:
        """``preprocessor_config.json``; empty without one."""

    def side_files(self) -> Mapping[str, Path]:
        """What stands beside the weights: name relative to them -> file."""


@dataclass(frozen=True)
class InMemory:
    """What a model in memory offers: its config, and the tokenizer that the caller gave with it."""

    config: Any
    given: PreTrainedTokenizerBase | None = None

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The given one; without it nobody knows which it is."""
        if self.given is None:
            raise UsageError(
                "a model in memory has no tokenizer here; give tokenizer=..., or data as token ids "
                "[samples, tokens], as the model's inputs by name, or as samples (nybble.data.token_samples, "
                "sentence_samples, pair_samples, image_samples)."
            )
        return self.given

    def preprocessing(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def side_files(self) -> Mapping[str, Path]:
        """Nothing."""
        return {}
