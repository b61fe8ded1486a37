"""Which architectures a supernet has: values for keys of its model's config, and formats for its weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nybble.core.errors import SchemeError, UsageError, did_you_mean
from nybble.quantizer import Quantizer
from nybble.search.evolution import Encoding

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FLOAT = "float"
"""The word of a format that leaves weights as they are."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """See the module.

    Attributes:
        config: of the largest model.
        choices: key of the config -> the values that it may have. A key that has a list has a gene for each entry.
        formats: quantizer lines, or ``float``: one gene more, for the weights of all linear layers in blocks.

    Raises:
        UsageError: a key that the config lacks, no value, one twice, or one above the largest model's.
    """

    config: PreTrainedConfig
    choices: Mapping[str, Sequence[int]]
    formats: Sequence[str] = field(default=())

    def __post_init__(self) -> None:
        if not self.choices and len(self.formats) < 2:
            raise UsageError("the space has one architecture; give keys of the config with several values each.")
        for key, values in self.choices.items():
            if not hasattr(self.config, key):
                raise UsageError(f"space: the config has no {key!r}.{did_you_mean(key, self.config.to_dict())}")
            if not values or len(set(values)) < len(values):
                raise UsageError(f"space: {key} needs values, each once; got {list(values)}.")
            most = min(self._whole(key))
            if max(values) > most or min(values) < 1:
                raise UsageError(f"space: {key} is between 1 and the model's {most}; got {list(values)}.")
        if len(set(self.formats)) < len(self.formats):
            raise UsageError(f"space: formats, each once; got {list(self.formats)}.")
        for line in self.formats:
            self.quantizer_of(line)

    def _whole(self, key: str) -> list[int]:
        found = getattr(self.config, key)
        return list(found) if isinstance(found, list | tuple) else [found]

    @staticmethod
    def quantizer_of(line: str) -> Quantizer | None:
        """A line of ``formats``; None for ``float``."""
        return None if line == FLOAT else Quantizer(line)

    @cached_property
    def genes(self) -> list[tuple[str, int | None, list[int]]]:
        """Key, place in its list (None: it isn't one), values from the least."""
        return [
            (key, place if isinstance(getattr(self.config, key), list | tuple) else None, sorted(values))
            for key, values in self.choices.items()
            for place in range(len(self._whole(key)))
        ]

    @property
    def sizes(self) -> list[int]:
        """How many choices each gene has; formats are the last one."""
        return [len(values) for _, _, values in self.genes] + ([len(self.formats)] if self.formats else [])

    @property
    def largest(self) -> Encoding:
        """Every key at its most, in the first format."""
        return tuple(len(values) - 1 for _, _, values in self.genes) + ((0,) if self.formats else ())

    @property
    def smallest(self) -> Encoding:
        """Every key at its least, in the last format."""
        return (0,) * len(self.genes) + ((len(self.formats) - 1,) if self.formats else ())

    @property
    def alone(self) -> Iterator[Encoding]:
        """Every choice of every gene once, in a network that is the largest else."""
        for gene, size in enumerate(self.sizes):
            for choice in range(size):
                yield (*self.largest[:gene], choice, *self.largest[gene + 1 :])

    def check(self, encoding: Sequence[int]) -> None:
        """Raise UsageError for an encoding that isn't of this space."""
        sizes = self.sizes
        if len(encoding) != len(sizes) or not all(0 <= at < size for at, size in zip(encoding, sizes, strict=True)):
            raise UsageError(f"{list(encoding)} is no architecture of this space: genes have {sizes} choices.")

    def values(self, encoding: Encoding) -> dict[str, Any]:
        """Key -> value or list of them, and ``weights``: a format, where there are several."""
        self.check(encoding)
        found: dict[str, Any] = {}
        for (key, place, values), at in zip(self.genes, encoding, strict=False):
            if place is None:
                found[key] = values[at]
            else:
                found.setdefault(key, []).append(values[at])
        return found | ({"weights": self.formats[encoding[-1]]} if self.formats else {})

    def config_of(self, encoding: Encoding) -> PreTrainedConfig:
        """The config of an architecture."""
        made = copy.deepcopy(self.config)
        for key, value in self.values(encoding).items():
            if key in self.choices:
                setattr(made, key, value)
        return made

    def quantizer(self, encoding: Encoding) -> Quantizer | None:
        """Of the weights in blocks; None leaves them as they are."""
        return self.quantizer_of(self.formats[encoding[-1]]) if self.formats else None

    def numbers(self, encoding: Encoding) -> Tensor:
        """What routers read, float32 [numbers]: a value's place between its key's least and most, from 0.01 on.

        That is the released encoding of BERT's widths; of a format it is its bits over 16.
        """
        self.check(encoding)
        found = [
            0.01 + (values[at] - values[0]) / max(1, values[-1] - values[0])
            for (_, _, values), at in zip(self.genes, encoding, strict=False)
        ]
        quantizer = self.quantizer(encoding)
        if self.formats:
            found.append(1.0 if quantizer is None else quantizer.format.bits / 16)
        return torch.tensor(found, dtype=torch.float32)


def make_space(config: PreTrainedConfig, given: Mapping[str, Any], formats: Sequence[str] = ()) -> Space:
    """A space from YAML's mapping.

    Raises:
        SchemeError: a key's values aren't a list of whole numbers. UsageError: as of :class:`Space`.
    """
    for key, values in given.items():
        whole = isinstance(values, list | tuple) and all(type(value) is int for value in values)
        if not whole:
            raise SchemeError(f"space: {key} is a list of whole numbers; got {values!r}.")
    return Space(config=config, choices=dict(given), formats=tuple(formats))
