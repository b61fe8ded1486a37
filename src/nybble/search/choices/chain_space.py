"""Spaces of networks: chains of blocks, each one of some operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nybble.core.errors import SchemeError, UsageError
from nybble.models.operations import KEEPING, make_operation
from nybble.models.own.chain import ChainConfig, ChainForImageClassification
from nybble.search.choices.blocks import Choices
from nybble.search.choices.macs import Table, table_of


@dataclass(frozen=True, kw_only=True)
class ChainSpace:
    """As :class:`~nybble.models.own.chain.ChainConfig` has them; each block has any of ``operations`` that fits it."""

    stem: int = 16
    stem_stride: int = 2
    head: int = 1024
    stages: tuple[tuple[int, int, int], ...] = ((64, 4, 2), (160, 4, 2), (320, 8, 2), (640, 4, 2))
    operations: tuple[str, ...] = ("shuffle-3", "shuffle-5", "shuffle-7", "xception")

    def __post_init__(self) -> None:
        if not self.operations or len({*self.operations}) != len(self.operations):
            raise SchemeError("space: operations are names of one or more, each once.")
        if not self.stages or any(min(stage) < 1 for stage in self.stages):
            raise SchemeError("space: a stage has channels, blocks and a stride, each 1 or more; there is one or more.")

    def names(self) -> list[list[str]]:
        """Operations of each block.

        Raises:
            SchemeError: a block that none fits.
        """
        found = []
        for into, out, stride in ChainConfig(**self._sizes()).shapes():
            changes = into != out or stride > 1
            fit = [name for name in self.operations if not (changes and name in KEEPING)]
            if not fit:
                raise SchemeError(f"space: no operation goes from {into} to {out} channels with stride {stride}.")
            found.append(fit)
        return found

    def supernet(self, about: Mapping[str, Any]) -> ChainForImageClassification:
        """All operations in every block; ``about``: what the config has of images and classes."""
        names = self.names()

        def make(number: int, into: int, out: int, stride: int) -> nn.Module:
            return Choices({name: make_operation(name, into, out, stride) for name in names[number]})

        return ChainForImageClassification(ChainConfig(**self._sizes(), **about), make)

    def network(self, about: Mapping[str, Any], encoding: Sequence[int]) -> ChainForImageClassification:
        """One network of the space, which a folder can hold."""
        config = ChainConfig(**self._sizes(), operations=self.words(encoding), **about)
        return ChainForImageClassification(config)

    def words(self, encoding: Sequence[int]) -> list[str]:
        """The operations' names."""
        return [names[number] for names, number in zip(self.names(), encoding, strict=True)]

    def encoding(self, words: Sequence[str]) -> tuple[int, ...]:
        """The numbers of operations.

        Raises:
            UsageError: another number of blocks, or an operation that a block can't be.
        """
        names = self.names()
        if len(words) != len(names):
            raise UsageError(f"the space has {len(names)} blocks, and {len(words)} operations are named.")
        for number, (word, fit) in enumerate(zip(words, names, strict=True)):
            if word not in fit:
                raise UsageError(f"block {number} can't be {word!r}; it is one of {', '.join(fit)}.")
        return tuple(fit.index(word) for word, fit in zip(words, names, strict=True))

    def table(self, about: Mapping[str, Any]) -> Table:
        """Multiply-accumulates of every operation."""
        with torch.device("meta"):
            return table_of(self.supernet(about), torch.zeros(1, about["num_channels"], *about["image_size"]))

    def _sizes(self) -> dict[str, Any]:
        return {
            "stem": self.stem, "stem_stride": self.stem_stride, "head": self.head,
            "stages": [list(stage) for stage in self.stages],
        }  # fmt: skip


def rows_of(space: ChainSpace, table: Table, encoding: Sequence[int]) -> list[dict[str, Any]]:
    """A table's rows: what each block became."""
    return [
        {"block": number, "operation": name, "multiply-accumulates": place[chosen]}
        for number, (name, place, chosen) in enumerate(
            zip(space.words(encoding), table.places, encoding, strict=True)
        )
    ]  # fmt: skip
