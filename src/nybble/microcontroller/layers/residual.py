"""The sum of two branches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from nybble.core.errors import UsageError
from nybble.microcontroller.arithmetic import Arithmetic
from nybble.microcontroller.layer import Layer, Parameters


@dataclass(frozen=True, kw_only=True)
class Add(Layer):
    """``y = a + b``; the gradient goes to both.

    Raises:
        UsageError: shapes that differ.
    """

    def __post_init__(self) -> None:
        if len(set(self.shapes)) > 1:
            raise UsageError(
                f"{self.name}: a residual sum of shapes that differ, {self.shapes[0]} and {self.shapes[1]}."
            )

    def forward(self, math: Arithmetic, held: Parameters, x: Sequence[Tensor]) -> Tensor:  # noqa: D102
        return x[0] + x[1]

    def back(self, math: Arithmetic, held: Parameters, x: Sequence[Tensor], y: Tensor, dy: Tensor) -> list[Tensor]:  # noqa: D102
        return [dy, dy]

    def c_forward(self) -> str:  # noqa: D102
        return f"add_forward({self.data(0)}, {self.data(1)}, {self.result}, {prod(self.out)});"

    def c_back(self, which: int, into: str) -> str:  # noqa: D102
        return f"copy({self.gradient}, {into}, {prod(self.out)});"
