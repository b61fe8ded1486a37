"""Instance norm, the norm of batches of one: sums in the 16-bit type, 1 / sqrt in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from nybble.microcontroller.arithmetic import Arithmetic
from nybble.microcontroller.layer import Layer, Parameters


@dataclass(frozen=True, kw_only=True)
class InstanceNorm(Layer):
    """Each channel to mean 0 and variance 1; parameters ``weight`` and ``bias`` ``[C]``, or none.

    The library of the paper hands dy on as dx; here dx is the gradient.

    Attributes:
        eps: added to the variance, in float32.
    """

    eps: float = 1e-5

    def forward(self, math: Arithmetic, held: Parameters, x: Sequence[Tensor]) -> Tensor:  # noqa: D102
        normal, _ = self._normal(math, x[0])
        if not held:
            return normal
        return math.multiply_add(held["bias"][:, None, None], held["weight"][:, None, None], normal)

    def learn(self, math: Arithmetic, held: Parameters, x: Sequence[Tensor], dy: Tensor) -> dict[str, Tensor]:  # noqa: D102
        if not held:
            return {}
        weight, bias = self._sums(math, self._normal(math, x[0])[0], dy)
        return {"weight": weight, "bias": bias}

    def back(self, math: Arithmetic, held: Parameters, x: Sequence[Tensor], y: Tensor, dy: Tensor) -> list[Tensor]:  # noqa: D102
        normal, scale = self._normal(math, x[0])
        weight, bias = (math.over(total, self._pixels) for total in self._sums(math, normal, dy))
        centred = dy - bias[:, None, None] - normal * weight[:, None, None]
        scale = held["weight"] * scale if held else scale
        return [scale[:, None, None] * centred]

    def _normal(self, math: Arithmetic, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[C, H, W]`` normalised, and what each channel was multiplied by, ``[C]``."""
        centred = x - math.over(math.sum(x.flatten(1)), self._pixels)[:, None, None]
        total = x.new_zeros(x.shape[0])
        for one in centred.flatten(1).unbind(1):
            total = math.multiply_add(total, one, one)
        variance = math.over(total, self._pixels).float() + torch.tensor(self.eps, dtype=torch.float32)
        root = variance.double().sqrt().float()  # torch's of float32 is not always the nearest; this is
        scale = (1.0 / root).to(math.dtype)
        return centred * scale[:, None, None], scale

    def _sums(self, math: Arithmetic, normal: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """Of ``dy * normal`` and of ``dy``, by channel."""
        total = dy.new_zeros(dy.shape[0])
        for one, other in zip(dy.flatten(1).unbind(1), normal.flatten(1).unbind(1), strict=True):
            total = math.multiply_add(total, one, other)
        return total, math.sum(dy.flatten(1))

    @property
    def _pixels(self) -> int:
        return prod(self.out[1:])

    @property
    def _c(self) -> str:
        eps = float(torch.tensor(self.eps, dtype=torch.float32)).hex()
        return f"{self.out[0]}, {self._pixels}, {eps}f"

    def c_forward(self) -> str:  # noqa: D102
        held = f"{self.parameter('weight')}, {self.parameter('bias')}"
        return f"norm_forward({self.data()}, {held}, {self.result}, {self._c});"

    def c_learn(self) -> str:  # noqa: D102
        if not self.parameters:
            return ""
        held = f"{self.parameter('weight', True)}, {self.parameter('bias', True)}"
        return f"norm_weight({self.data()}, {self.gradient}, {held}, {self._c});"

    def c_back(self, which: int, into: str) -> str:  # noqa: D102
        return f"norm_input({self.data()}, {self.parameter('weight')}, {self.gradient}, {into}, {self._c});"
