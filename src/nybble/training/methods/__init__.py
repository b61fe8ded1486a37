"""Ways to train a model in few bits, one a file: what ``nybble train METHOD`` can be told.

The pipeline does what all share: data, the loop, checkpoints, measures, the report. A method says what the model is
made of before, what trains in it, and what its result is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from nybble.core.registry import Registry


class Method(ABC):
    """One way to train.

    Attributes:
        summary: one line. source: the paper.
        options_type: frozen dataclass of what ``--set`` gives it.
        weights: the quantizer line of the base that the run makes first; None: it trains the float model.
        continues: whether it can go on from an earlier result (``--adapter``).
    """

    summary: ClassVar[str]
    source: ClassVar[str]
    options_type: ClassVar[type[Any]]
    weights: ClassVar[str | None] = None
    continues: ClassVar[bool] = False

    @abstractmethod
    def needed(self) -> None:
        """Raise UsageError where a package that the method needs is missing."""

    def base_of(self, start: Path) -> str:
        """Where the base of an earlier result was, as the result says; of methods that can go on from one.

        Raises:
            NybbleError: there is no result.
        """
        raise NotImplementedError

    @abstractmethod
    def attach(self, model: nn.Module, options: Any, start: Path | None, seed: int) -> nn.Module:
        """The model with what trains in it; parameters that don't train need no gradient.

        Args:
            model: the base, loaded; changed in place.
            options: an ``options_type``.
            start: an earlier result to go on from.
            seed: of what begins at random.

        Raises:
            NybbleError: nothing in the model can be trained this way, or ``start`` doesn't fit it.
        """

    @abstractmethod
    def parts(self, model: nn.Module) -> Mapping[str, int]:
        """Bytes of the parameters and buffers, by what they are for."""

    @abstractmethod
    def save(self, model: nn.Module, folder: Path, base: str) -> None:
        """Write the result into a folder that exists; ``base``: where the base will be found."""

    @abstractmethod
    def merged(self, model: nn.Module) -> nn.Module:
        """The model as one, for ``nybble.save``; what trained is taken out of ``model``."""


METHODS = Registry("nybble.training.methods", "training method", lambda part: isinstance(part, Method))
