"""A layer of a stack: what it computes in a training step, and the C that computes the same."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from torch import Tensor

from nybble.microcontroller.arithmetic import Arithmetic

Shape = tuple[int, ...]
Parameters = Mapping[str, Tensor]
STEPS = ("forward", "weight gradient", "input gradient")


@dataclass(frozen=True, kw_only=True)
class Layer(ABC):
    """One layer; tensors are of one sample, numbered within the stack.

    Attributes:
        name: of the module.
        inputs: numbers of the tensors that it reads. output: of the one that it makes.
        shapes: of the inputs. out: of the output.
        parameters: role -> shape, of what is learned.
    """

    name: str
    inputs: tuple[int, ...]
    output: int
    shapes: tuple[Shape, ...]
    out: Shape
    parameters: Mapping[str, Shape] = field(default_factory=dict)

    @abstractmethod
    def forward(self, math: Arithmetic, held: Parameters, x: Sequence[Tensor]) -> Tensor:
        """The output of its inputs."""

    def learn(self, math: Arithmetic, held: Parameters, x: Sequence[Tensor], dy: Tensor) -> dict[str, Tensor]:
        """Gradients of its parameters."""
        return {}

    @abstractmethod
    def back(self, math: Arithmetic, held: Parameters, x: Sequence[Tensor], y: Tensor, dy: Tensor) -> list[Tensor]:
        """Gradients of its inputs."""

    def c_declarations(self) -> list[str]:
        """What stands before the functions, a line each."""
        return []

    @abstractmethod
    def c_forward(self) -> str:
        """The statement of the forward step."""

    def c_learn(self) -> str:
        """The statement that makes the gradients of its parameters."""
        return ""

    @abstractmethod
    def c_back(self, which: int, into: str) -> str:
        """The statement that makes the gradient of an input, ``which``, in the array ``into``."""

    @property
    def products(self) -> tuple[int, int, int]:
        """Multiply-adds of each of :data:`STEPS`, those of matrix products."""
        return 0, 0, 0

    def columns(self, back: bool) -> int:
        """Elements of the buffer for im2row, which all layers share; ``back``: of the input gradient's."""
        return 0

    @property
    def turned(self) -> int:
        """Elements of the buffer for a transposed weight, which all layers share."""
        return 0

    @property
    def own_bytes(self) -> int:
        """Bytes of an array of its own, ``NAME_own``, that the forward step leaves for the backward one."""
        return 0

    def elements(self) -> tuple[int, int, int]:
        """Elements that each of :data:`STEPS` has to hold: inputs, parameters, buffers, output."""
        around = sum(map(prod, self.shapes)) + prod(self.out)
        learned = sum(prod(shape) for shape in self.parameters.values())
        return (
            around + learned + self.columns(False),
            around + learned + self.columns(False) if learned else 0,
            around + learned + self.columns(True) + self.turned,
        )

    @property
    def id(self) -> str:
        """Its name as C writes it."""
        return identifier(self.name)

    def data(self, which: int = 0) -> str:
        """C's array of an input."""
        return f"t{self.inputs[which]}"

    @property
    def result(self) -> str:
        """C's array of the output."""
        return f"t{self.output}"

    @property
    def gradient(self) -> str:
        """C's array of the output's gradient."""
        return f"g{self.output}"

    def parameter(self, role: str, gradient: bool = False) -> str:
        """C's array of a parameter, or of its gradient; ``0`` where there is none."""
        return f"{'d' if gradient else ''}{self.id}_{role}" if role in self.parameters else "0"


def identifier(name: str) -> str:
    """A module's name as a C identifier."""
    return "l_" + re.sub(r"\W", "_", name)
