"""Convolutions: through im2row, any groups (depthwise among them); pointwise ones without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from nybble.microcontroller.arithmetic import Arithmetic
from nybble.microcontroller.layer import Layer, Parameters
from nybble.microcontroller.matrix_forms import (
    conv_forward,
    conv_input,
    conv_weight,
    pointwise_forward,
    pointwise_input,
    pointwise_weight,
)
from nybble.microcontroller.transforms import Window


class _Biased(Layer):
    """What both have in common: a bias of each channel."""

    def _with_bias(self, y: Tensor, held: Parameters) -> Tensor:
        return y + held["bias"][:, None, None] if "bias" in held else y

    def _bias(self, math: Arithmetic, held: Parameters, dy: Tensor) -> dict[str, Tensor]:
        return {"bias": math.sum(dy.flatten(1))} if "bias" in held else {}

    def _c_bias(self, learn: bool) -> str:
        if "bias" not in self.parameters:
            return ""
        channels, pixels = self.out[0], prod(self.out[1:])
        if learn:
            return f" row_sums({self.gradient}, {self.parameter('bias', True)}, {channels}, {pixels});"
        return f" add_bias({self.result}, {self.parameter('bias')}, {channels}, {pixels});"


@dataclass(frozen=True, kw_only=True)
class Conv(_Biased):
    """A convolution; parameters ``weight`` ``[Co, Ci / groups, Hk, Wk]`` and, where there is one, ``bias``.

    Attributes:
        window: of the kernel. groups: those of channels.
    """

    window: Window
    groups: int = 1

    def forward(self, math: Arithmetic, held: Parameters, x: Sequence[Tensor]) -> Tensor:  # noqa: D102
        return self._with_bias(conv_forward(math, x[0], held["weight"], self.window, self.groups), held)

    def learn(self, math: Arithmetic, held: Parameters, x: Sequence[Tensor], dy: Tensor) -> dict[str, Tensor]:  # noqa: D102
        weight = conv_weight(math, x[0], dy, self.window, self.groups)
        return {"weight": weight} | self._bias(math, held, dy)

    def back(self, math: Arithmetic, held: Parameters, x: Sequence[Tensor], y: Tensor, dy: Tensor) -> list[Tensor]:  # noqa: D102
        return [conv_input(math, dy, held["weight"], self.window, self.groups)]

    def c_declarations(self) -> list[str]:  # noqa: D102
        w, (co, ho, wo) = self.window, self.out
        numbers = (
            *(self.shapes[0][0], w.height, w.width, co, ho, wo),
            *(*w.kernel, *w.stride, w.padding[0], w.padding[2], self.groups),
        )
        return [f"static const conv_shape {self.id}_shape = {{{', '.join(map(str, numbers))}}};"]

    def c_forward(self) -> str:  # noqa: D102
        weight = self.parameter("weight")
        return f"conv_forward(&{self.id}_shape, {self.data()}, {weight}, {self.result}, columns);" + self._c_bias(False)

    def c_learn(self) -> str:  # noqa: D102
        gradient = self.parameter("weight", True)
        call = f"conv_weight(&{self.id}_shape, {self.data()}, {self.gradient}, {gradient}, columns);"
        return call + self._c_bias(True)

    def c_back(self, which: int, into: str) -> str:  # noqa: D102
        weight = self.parameter("weight")
        return f"conv_input(&{self.id}_shape, {weight}, {self.gradient}, {into}, columns, turned);"

    @property
    def products(self) -> tuple[int, int, int]:  # noqa: D102
        weight, (_, ho, wo) = prod(self.parameters["weight"]), self.out
        # the input gradient is that of a step of one, over zeros too
        return weight * ho * wo, weight * ho * wo, weight * self.window.height * self.window.width

    def columns(self, back: bool) -> int:  # noqa: D102
        (co, ho, wo), taps = self.out, prod(self.window.kernel)
        if back:
            return co // self.groups * taps * self.window.height * self.window.width
        return self.shapes[0][0] // self.groups * taps * ho * wo

    @property
    def turned(self) -> int:  # noqa: D102
        return prod(self.parameters["weight"]) // self.groups


@dataclass(frozen=True, kw_only=True)
class Pointwise(_Biased):
    """A convolution of one pixel; parameters ``weight`` ``[Co, Ci, 1, 1]`` and, where there is one, ``bias``."""

    def forward(self, math: Arithmetic, held: Parameters, x: Sequence[Tensor]) -> Tensor:  # noqa: D102
        return self._with_bias(pointwise_forward(math, x[0], held["weight"].flatten(1)), held)

    def learn(self, math: Arithmetic, held: Parameters, x: Sequence[Tensor], dy: Tensor) -> dict[str, Tensor]:  # noqa: D102
        weight = pointwise_weight(math, x[0], dy)[..., None, None]
        return {"weight": weight} | self._bias(math, held, dy)

    def back(self, math: Arithmetic, held: Parameters, x: Sequence[Tensor], y: Tensor, dy: Tensor) -> list[Tensor]:  # noqa: D102
        return [pointwise_input(math, dy, held["weight"].flatten(1))]

    @property
    def _sizes(self) -> tuple[int, int, int]:
        return self.out[0], self.shapes[0][0], prod(self.out[1:])

    def c_forward(self) -> str:  # noqa: D102
        co, ci, pixels = self._sizes
        call = f"mm({self.parameter('weight')}, {self.data()}, {self.result}, {co}, {ci}, {pixels}, 0);"
        return call + self._c_bias(False)

    def c_learn(self) -> str:  # noqa: D102
        co, ci, pixels = self._sizes
        call = f"mm({self.gradient}, {self.data()}, {self.parameter('weight', True)}, {co}, {pixels}, {ci}, 1);"
        return call + self._c_bias(True)

    def c_back(self, which: int, into: str) -> str:  # noqa: D102
        co, ci, pixels = self._sizes
        turn = f"transpose({self.parameter('weight')}, turned, {co}, {ci});"
        return f"{turn} mm(turned, {self.gradient}, {into}, {ci}, {co}, {pixels}, 0);"

    @property
    def products(self) -> tuple[int, int, int]:  # noqa: D102
        return (prod(self._sizes),) * 3

    @property
    def turned(self) -> int:  # noqa: D102
        return self.out[0] * self.shapes[0][0]
