"""A linear layer; an image is read as one row, channel after channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from nybble.microcontroller.arithmetic import Arithmetic
from nybble.microcontroller.layer import Layer, Parameters
from nybble.microcontroller.matrix_forms import linear_forward, linear_input, linear_weight


@dataclass(frozen=True, kw_only=True)
class Linear(Layer):
    """``y = W x + b``; parameters ``weight`` ``[Co, Ci]`` and, where there is one, ``bias``."""

    def forward(self, math: Arithmetic, held: Parameters, x: Sequence[Tensor]) -> Tensor:  # noqa: D102
        y = linear_forward(math, x[0].flatten(), held["weight"])
        return y + held["bias"] if "bias" in held else y

    def learn(self, math: Arithmetic, held: Parameters, x: Sequence[Tensor], dy: Tensor) -> dict[str, Tensor]:  # noqa: D102
        found = {"weight": linear_weight(math, x[0].flatten(), dy)}
        return found | ({"bias": dy.clone()} if "bias" in held else {})

    def back(self, math: Arithmetic, held: Parameters, x: Sequence[Tensor], y: Tensor, dy: Tensor) -> list[Tensor]:  # noqa: D102
        return [linear_input(math, dy, held["weight"]).reshape(x[0].shape)]

    @property
    def _sizes(self) -> tuple[int, int]:
        return self.out[0], prod(self.shapes[0])

    def c_forward(self) -> str:  # noqa: D102
        co, ci = self._sizes
        product = f"mm({self.parameter('weight')}, {self.data()}, {self.result}, {co}, {ci}, 1, 1);"
        return product + (f" add_bias({self.result}, {self.parameter('bias')}, {co}, 1);" if self._biased else "")

    def c_learn(self) -> str:  # noqa: D102
        co, ci = self._sizes
        product = f"mm({self.gradient}, {self.data()}, {self.parameter('weight', True)}, {co}, 1, {ci}, 0);"
        copied = f" copy({self.gradient}, {self.parameter('bias', True)}, {co});"
        return product + (copied if self._biased else "")

    def c_back(self, which: int, into: str) -> str:  # noqa: D102
        co, ci = self._sizes
        return f"mm({self.gradient}, {self.parameter('weight')}, {into}, 1, {co}, {ci}, 0);"

    @property
    def products(self) -> tuple[int, int, int]:  # noqa: D102
        return (prod(self._sizes),) * 3

    @property
    def _biased(self) -> bool:
        return "bias" in self.parameters
