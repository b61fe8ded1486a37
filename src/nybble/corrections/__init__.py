"""Corrections: what is done to a layer after it was quantized, to give back a part of what that lost. One a file.

They see the quantized layer that will be stored, the float truth of its weight, and what calibration feeds the block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from nybble.calibration.window import Window
from nybble.core.registry import Registry
from nybble.nn.kinds import Target
from nybble.recipe import ROOMS
from nybble.scheme import matches

REGISTRY = Registry(*ROOMS["correction"], lambda part: isinstance(part, type) and issubclass(part, Correction))


@dataclass(frozen=True, kw_only=True)
class Correction(ABC):
    """A method; its fields are its options in a recipe.

    Attributes:
        targets: as a scheme's: classes, names in the block, or ``re:`` patterns; empty for all layers that it can take.
        reads_inputs: whether it looks at what calibration feeds a block.
    """

    reads_inputs: ClassVar[bool] = False
    targets: tuple[str, ...] = ()

    @abstractmethod
    def can_take(self, target: Target) -> bool:
        """Whether it can be done to a target."""

    def takes(self, target: Target, classes: Sequence[str]) -> bool:
        """Whether it will be done to a target of a module with these class names."""
        wanted = not self.targets or any(matches(pattern, target.name, classes) for pattern in self.targets)
        return wanted and self.can_take(target)

    def check(self, target: Target) -> None:  # noqa: B027  most have nothing to refuse
        """Raise SchemeError where it will be done to a target that it can't do right by; names what it can."""

    @abstractmethod
    def run(self, window: Window, targets: Sequence[Target], path: str) -> None:
        """Correct the quantized layers of one block in place, and note in their records what it did.

        Args:
            window: one block.
            targets: those of its targets that it takes.
            path: on which the block's inputs are looked at.
        """

    def working_bytes(self, rows: int, columns: int) -> int:
        """Most memory that :meth:`run` needs for a weight [rows, columns], in bytes."""
        return 16 * rows * columns

    def flops(self, rows: int, columns: int) -> float:
        """Multiply-adds x 2 for such a weight."""
        return 0.0

    def stored_bytes(self, rows: int, columns: int) -> float:
        """Bytes that it adds to the file for such a weight."""
        return 0.0


def make_correction(name: str, options: Mapping[str, Any]) -> Correction:
    """A correction from a recipe's step.

    Raises:
        UsageError: unknown correction. SchemeError: unknown option, or a value of the wrong type.
    """
    made: Correction = REGISTRY.make(name, options)
    return made
