"""Activations: comparisons in the type itself, exp in float32 and rounded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from nybble.core.errors import UsageError, did_you_mean
from nybble.microcontroller.arithmetic import Arithmetic, exp32
from nybble.microcontroller.layer import Layer, Parameters

ACTIVATIONS = ("relu", "relu6", "leaky_relu", "sigmoid", "gelu")
_ROOT, _CUBIC = float.fromhex("0x1.988454p-1"), float.fromhex("0x1.6e4e26p-5")  # sqrt(2 / pi), 0.044715
_THRICE = float.fromhex("0x1.12ba9ep-3")


@dataclass(frozen=True, kw_only=True)
class Activation(Layer):
    """One of :data:`ACTIVATIONS`; GELU is the one of tanh.

    Attributes:
        kind: which. slope: of a leaky ReLU below zero, rounded to the type.

    Raises:
        UsageError: no such activation.
    """

    kind: str
    slope: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ACTIVATIONS:
            raise UsageError(f"{self.name}: no activation {self.kind!r}.{did_you_mean(self.kind, ACTIVATIONS)}")

    def forward(self, math: Arithmetic, held: Parameters, x: Sequence[Tensor]) -> Tensor:  # noqa: D102
        (given,) = x
        zero = torch.zeros_like(given)
        if self.kind == "relu":
            return torch.where(given > 0, given, zero)
        if self.kind == "relu6":
            return torch.where(given > 0, torch.where(given < 6, given, zero + 6), zero)
        if self.kind == "leaky_relu":
            return torch.where(given > 0, given, given * math.constant(self.slope))
        if self.kind == "sigmoid":
            return (1.0 / (exp32(-given.float()) + 1.0)).to(math.dtype)
        wide = given.float()
        return (wide * 0.5 * (_tanh(wide) + 1.0)).to(math.dtype)

    def back(self, math: Arithmetic, held: Parameters, x: Sequence[Tensor], y: Tensor, dy: Tensor) -> list[Tensor]:  # noqa: D102
        (given,), zero = x, torch.zeros_like(dy)
        if self.kind == "relu":
            return [torch.where(given > 0, dy, zero)]
        if self.kind == "relu6":
            return [torch.where((given > 0) & (given < 6), dy, zero)]
        if self.kind == "leaky_relu":
            return [torch.where(given > 0, dy, dy * math.constant(self.slope))]
        if self.kind == "sigmoid":
            return [dy * (y * (1.0 - y))]
        return [dy * _gelu_slope(given.float()).to(math.dtype)]

    def c_forward(self) -> str:  # noqa: D102
        return f"{self.kind}_forward({self.data()}, {self.result}, {prod(self.out)}{self._c_slope});"

    def c_back(self, which: int, into: str) -> str:  # noqa: D102
        of = self.result if self.kind == "sigmoid" else self.data()
        return f"{self.kind}_input({of}, {self.gradient}, {into}, {prod(self.out)}{self._c_slope});"

    @property
    def _c_slope(self) -> str:
        return f", narrow({_single(self.slope)}f)" if self.kind == "leaky_relu" else ""


def _single(value: float) -> str:
    return float(torch.tensor(value, dtype=torch.float32)).hex()


def _tanh(x: Tensor) -> Tensor:
    """Of ``sqrt(2 / pi) (x + 0.044715 x^3)``, in float32."""
    inner = (x * x * x * _CUBIC + x) * _ROOT
    return 1.0 - 2.0 / (exp32(inner + inner) + 1.0)


def _gelu_slope(x: Tensor) -> Tensor:
    tanh = _tanh(x)
    inner = (x * x * _THRICE + 1.0) * _ROOT
    return (tanh + 1.0) * 0.5 + x * 0.5 * (1.0 - tanh * tanh) * inner
