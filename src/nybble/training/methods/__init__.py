"""Ways to train a model in few bits, one a file: what a training recipe names as its ``method``.

The pipeline does what all share: data, the loop, checkpoints, measures, the report. A method says what the model is
made of before, what trains in it, what it is told, and what its result is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nybble.core.registry import Registry
from nybble.quantizer import Quantizer
from nybble.scheme import Scheme
from nybble.training.callbacks import Acting
from nybble.training.coreset import CoresetOptions
from nybble.training.recipe import METHOD


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a method gets beside the model.

    Attributes:
        options: its ``options_type``. scheme: what is quantized, and to what.
        seed: of what begins at random. start: an earlier result to go on from.
        stage: from 0, of a :class:`StagedMethod`. before: the model of the stage before, whose float weights it has.
        run: calls the model on a batch, for what begins where activations lie.
        known: quantizers that packed weights of the model may be of.
    """

    options: Any
    scheme: Scheme
    seed: int = 0
    start: Path | None = None
    stage: int = 0
    before: nn.Module | None = None
    run: Callable[[nn.Module], object] | None = None
    known: Sequence[Quantizer] = ()


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a result goes.

    Attributes:
        folder: exists. base: where the base will be found.
        dtype: of the model that was given.
    """

    folder: Path
    base: str
    dtype: torch.dtype


class Method(ABC):
    """One way to train.

    Attributes:
        summary: one line.
        options_type: frozen dataclass of what ``--set`` gives it.
        packs: whether it trains on a packed base, which the run makes first of a float model; else it takes the float
            model, in float32, and ``dtype`` is that of the products.
        tasks: names of those that its models do; none: any.
    """

    summary: ClassVar[str]
    options_type: ClassVar[type[Any]]
    packs: ClassVar[bool] = False
    tasks: ClassVar[tuple[str, ...]] = ()

    def needed(self) -> None:  # noqa: B027 - some need nothing
        """Raise UsageError where a package that the method needs is missing."""

    def check(self, options: Any, scheme: Scheme) -> None:  # noqa: B027 - most options are right by their types
        """Refuse options that the types of their fields let through."""

    def check_asked(self, asked: Mapping[str, Any], options: Any, scheme: Scheme) -> None:  # noqa: B027 - as above
        """Refuse what was ``asked`` for over the recipe's options and would do nothing."""

    @abstractmethod
    def attach(self, model: nn.Module, given: Given) -> nn.Module:
        """The model with what trains in it; parameters that don't train need no gradient.

        Raises:
            NybbleError: nothing in the model can be trained this way, or what was given doesn't fit it.
        """

    def losses(self, options: Any) -> Mapping[str, Any]:
        """What the network is told: losses by name, each a weight or a mapping of one and options; empty: its task."""
        return {}

    def coreset(self, options: Any) -> CoresetOptions | None:
        """Which part of the examples is trained on; None: all."""
        return None

    def norm_batches(self, options: Any) -> int:
        """Batches through which BatchNorms are measured anew behind the last update; 0: they stay as they are."""
        return 0

    def groups(self, model: nn.Module, options: Any, lr: float) -> list[dict[str, Any]] | None:
        """Parameters for an optimizer, as torch takes them, where some have a rate of their own; None: all alike."""
        return None

    def callbacks(self, model: nn.Module, options: Any) -> Mapping[str, Acting]:
        """What looks at the weights at every update, by name: of a model that :meth:`attach` has made."""
        return {}

    @abstractmethod
    def parts(self, model: nn.Module) -> Mapping[str, int]:
        """Bytes of the parameters and buffers, by what they are for."""

    @abstractmethod
    def finished(self, model: nn.Module, place: Place) -> nn.Module:
        """The model as its result will compute; changed in place."""


class StagedMethod(Method):
    """One with several trainings, one behind the other; each begins with the weights of the one before."""

    @abstractmethod
    def stages(self, options: Any) -> int:
        """How many there are, from 1."""

    @abstractmethod
    def float_values(self, model: nn.Module) -> dict[str, Tensor]:
        """The float weights of a model behind a stage, by their names in the model that :meth:`attach` gets."""

    @abstractmethod
    def taught_by_stage(self, options: Any) -> bool:
        """Whether the teacher of a stage is the network of the one before, and not the float one."""


class AdapterMethod(Method):
    """One whose result is an adapter, which lies beside a base; it can go on from an earlier one (``--adapter``)."""

    @abstractmethod
    def base_of(self, start: Path) -> str:
        """Where the base of an earlier result was, as the result says.

        Raises:
            NybbleError: there is no result.
        """

    def finished(self, model: nn.Module, place: Place) -> nn.Module:
        """The base and the adapter, as they trained."""
        return model

    @abstractmethod
    def save(self, model: nn.Module, place: Place) -> None:
        """Write the adapter."""

    @abstractmethod
    def merged(self, model: nn.Module) -> nn.Module:
        """Both as one model, for ``nybble.save``; the adapter is taken out of ``model``."""


METHODS = Registry(*METHOD, lambda part: isinstance(part, Method))
