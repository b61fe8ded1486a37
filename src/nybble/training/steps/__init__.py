"""Training of the whole float network before a recipe's other steps begin: one method a file.

A step gets the network as those other steps quantize it in a first pass, and gives other float weights: what the real
pass then quantizes from the start. Nothing that it trained with is left in the result.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nybble.calibration.lessons import Inputs, Lessons, main_output
from nybble.core.registry import Registry
from nybble.core.shapes import Bool, Float, Float32
from nybble.nn.layer import QuantLayer
from nybble.recipe import ROOMS

__all__ = ["REGISTRY", "Inputs", "TrainStep", "Trainee", "main_output", "make_train_step"]

REGISTRY = Registry(*ROOMS["train"], lambda part: isinstance(part, type) and issubclass(part, TrainStep))


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


class TrainStep(ABC):
    """A method; its fields are its options in a recipe."""

    @property
    def idle(self) -> bool:
        """Whether its options turn it off, so that there is no first pass either."""
        return False

    @property
    def samples(self) -> int:
        """How many samples it wants of a SRC; 0: those that the other steps are calibrated on."""
        return 0

    @abstractmethod
    def working_bytes(self, elements: int, dtype: torch.dtype) -> int:
        """Most memory that it takes beside activations, for quantized layers of so many weights in all."""

    @abstractmethod
    def run(self, trainee: Trainee) -> dict[str, Float32[Tensor, "_rows _columns"]]:
        """Train.

        Returns:
            by the names of ``trainee.layers``, the float weight of those that it changes: [out, in].

        Raises:
            LearningError: a loss is no number.
        """


def make_train_step(name: str, options: Mapping[str, Any]) -> TrainStep:
    """A training step from a recipe's.

    Raises:
        UsageError: unknown step. SchemeError: unknown option, or a value of the wrong type.
    """
    made: TrainStep = REGISTRY.make(name, options)
    return made
