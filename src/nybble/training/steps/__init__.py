"""Training of the whole network, in front of a recipe's other steps or behind them all: one method a file.

In front (:class:`Preparation`): a step gets the network as the other steps quantize it in a first pass, and gives other
float weights: what the real pass then quantizes from the start. Nothing that it trained with is left in the result.

Behind (:class:`Finish`): a step gets the quantized network, and moves in it what the file has room for anyhow: scales,
norms, biases. Codes stay.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nybble.calibration.lessons import Inputs, Lessons, main_output
from nybble.core.progress import Progress
from nybble.core.registry import Registry
from nybble.core.shapes import Bool, Float, Float32
from nybble.nn.layer import QuantLayer
from nybble.quantizer import Quantizer
from nybble.recipe import ROOMS

__all__ = ["REGISTRY", "Inputs", "TrainStep", "Trainee", "main_output", "make_train_step"]

REGISTRY = Registry(*ROOMS["train"], lambda part: isinstance(part, type) and issubclass(part, TrainStep))
MODEL = "model"
"""What reports call the window that is the whole model."""


@dataclass(frozen=True, kw_only=True)
class Trainee(Lessons):
    """A network after the first pass, and what it is trained on.

    Attributes:
        model: quantized, in evaluation mode; its own to change.
        layers: its quantized layers with packed weights, by full name.
    """

    model: nn.Module
    layers: Mapping[str, QuantLayer]

    def output(self, inputs: Inputs) -> Float[Tensor, " samples *rest"]:
        """What the network gives for these."""
        return main_output(self.model(**inputs))

    def loss(
        self, inputs: Inputs, real: Bool[Tensor, "samples tokens"] | None, wanted: Tensor | None = None
    ) -> Float32[Tensor, ""]:
        """See :meth:`~nybble.calibration.lessons.Lessons.judged`, of what the network gives for these."""
        return self.judged(self.output(inputs), inputs, real, wanted)


@dataclass(frozen=True, kw_only=True)
class Student:
    """A quantized network that is to be finished, and what it learns from.

    Attributes:
        model: in evaluation mode, changed in place.
        weights: its packed weights, by the full names of the modules that hold them (:class:`nybble.nn.packed.Packed`),
            with the quantizers that they may be of.
        blocks: full names of its blocks; empty where all of it is one.
        samples: how many there are. batch: as of :class:`Trainee`.
        teacher: brings the float network, whole, and gives what it says to the same inputs.
        seed: of everything that is drawn.
        token_ids: whether the model reads tokens, each of which tells the one before it.
    """

    model: nn.Module
    weights: Mapping[str, Sequence[Quantizer]]
    blocks: Sequence[str]
    samples: int
    batch: Callable[[list[int]], tuple[Inputs, Tensor | None]]
    teacher: Callable[[], Callable[[Inputs], Any]]
    seed: int
    token_ids: bool


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What finishing came to, in numbers for the report.

    Attributes:
        entry: as of a window of a reconstruction (``window``, ``blocks``, ``loss``, ``before`` and ``after`` on samples
            that weren't trained on, ``steps``, ``kept``, ``diverged``, ``curve``).
        scales: for each weight whose scales learned the smallest, median and largest ratio to what they were.
    """

    entry: dict[str, Any]
    scales: Mapping[str, tuple[float, float, float]]


class TrainStep(ABC):
    """A method; its fields are its options in a recipe."""

    @property
    def idle(self) -> bool:
        """Whether its options turn it off, so that nothing is done for it either."""
        return False

    @property
    def samples(self) -> int:
        """How many samples it wants of a SRC; 0: those that the other steps are calibrated on."""
        return 0

    @abstractmethod
    def working_bytes(self, elements: int, dtype: torch.dtype) -> int:
        """Most memory that it takes beside activations, for quantized layers of so many weights in all."""

    @abstractmethod
    def passes(self, samples: int) -> float:
        """How many forwards of one sample through the whole network it costs, with so many samples; about.

        A backward counts as two.
        """


class Preparation(TrainStep):
    """Comes before all other steps."""

    @property
    def judges(self) -> bool:
        """Whether the network is quantized a second time to judge what :meth:`run` came to."""
        return False

    def judge(self, trainee: Trainee) -> float | None:
        """The loss of a quantized network, on what :meth:`run` doesn't train on; lower is better, None: not judged.

        Asked of the first pass before it is trained, and of a second one over what training came to; which is dropped
        unless the second is better.
        """
        return None

    @abstractmethod
    def run(self, trainee: Trainee) -> dict[str, Float32[Tensor, "_rows _columns"]]:
        """Train.

        Returns:
            by the names of ``trainee.layers``, the float weight of those that it changes: [out, in]. Empty where it
            was of no use: the network stays as it came.

        Raises:
            LearningError: a loss is no number.
        """


class Finish(TrainStep):
    """Comes after all other steps."""

    @property
    def optional(self) -> bool:
        """Whether a run goes on without it, and says so, where it can't be done or takes more than it may."""
        return False

    def excess(self, elements: int, dtype: torch.dtype) -> str:
        """Why a model of so many weights makes an optional step take more than it may; empty where it doesn't."""
        return ""

    def check(self, model: nn.Module, layers: Sequence[nn.Module], samples: int | None, token_ids: bool) -> None:
        """Refuse before any work what can be seen beforehand.

        Args:
            model: float, perhaps without values.
            layers: its modules that will be quantized.
            samples: how many there will be to train on; None where nobody knows yet.
            token_ids: whether its tokens are its input, each of which tells the one before it.

        Raises:
            SchemeError: it would find nothing to learn. DataError: too few samples. ModelError: the model gives
                nothing of what the loss compares.
        """

    @abstractmethod
    def run(self, student: Student, progress: Progress) -> Finished:
        """Train what is in ``student.model``, never to worse than it was on samples that aren't trained on.

        Raises:
            LearningError: a loss is no number. DataError: too few samples. ModelError: the model has no such output.
        """


def make_train_step(name: str, options: Mapping[str, Any]) -> TrainStep:
    """A training step from a recipe's.

    Raises:
        UsageError: unknown step. SchemeError: unknown option, or a value of the wrong type.
    """
    made: TrainStep = REGISTRY.make(name, options)
    return made
