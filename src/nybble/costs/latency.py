"""Milliseconds of the searched layers on this machine: each shape in each format, timed in the layer that nybble runs.

A layer of the shape, with weights of a normal distribution packed in the format, multiplies rows in bfloat16 through
the kernel that the packed model would take (:meth:`nybble.nn.linear.QuantLinear.how`); where there is none, through
dense weights, which is what it costs then. Layers of one shape share a time, so their order can't depend on noise.

Of a model that writes text a call has one row, the token that is written; of others a sample's rows. Attention, norms
and layers that stay in float come on top: a budget is of the searched layers. ``nybble bench`` times whole models.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from nybble.core.errors import SchemeError
from nybble.core.options import at_least_one
from nybble.core.seeds import generator
from nybble.costs import Cost, Keep, Sized
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.linear import QuantLinear
from nybble.quantizer import Quantizer

DTYPE = torch.bfloat16
"""Of a packed model."""
WARMING = 3
"""Calls ahead: the first ones make buffers and code."""
NANO = 1_000_000
"""Nanoseconds in a millisecond: the whole units that times are kept in."""


@dataclass(frozen=True, kw_only=True)
class Latency(Cost):
    """The median of some calls, in whole nanoseconds.

    Attributes:
        calls: that are timed of each shape and format. device: cpu or cuda. keep: of the times.
    """

    calls: int = 21
    device: str = "cpu"
    keep: Keep = lambda key, measure: measure()
    unit: ClassVar[str] = "milliseconds of the searched layers"
    needs_macs: ClassVar[bool] = True
    measured: ClassVar[bool] = True

    def __post_init__(self) -> None:
        at_least_one(calls=self.calls)

    def here(self, device: str, keep: Keep) -> Latency:  # noqa: D102
        return replace(self, device=device, keep=keep)

    def of(self, layer: Sized, weights: Quantizer) -> int:  # noqa: D102
        if not layer.linear:
            raise SchemeError(
                f"{layer.name} is no linear layer, and latency times packed products of linear layers; ignore it, or "
                "give a budget of bytes or bops."
            )
        rows = max(1, layer.rows)
        key = f"latency {rows} x {layer.shape[1]} x {layer.shape[0]}, {weights}, {layer.inputs or 'float'}"
        (found,) = self.keep(key, partial(self._timed, layer, weights, rows))
        return int(found) * layer.matrices

    def _timed(self, layer: Sized, weights: Quantizer, rows: int) -> list[float]:
        packed, x = timed_layer(layer, weights, rows, self.device)
        return [float(max(1, round(1e9 * seconds(packed, x, self.calls))))]

    def limit(self, budget: float, layers: Sequence[Sized]) -> int:  # noqa: D102
        return int(round(budget * NANO, 3))

    def shown(self, total: int, layers: Sequence[Sized]) -> float:  # noqa: D102
        return total / NANO


def timed_layer(layer: Sized, weights: Quantizer, rows: int, device: str) -> tuple[QuantLinear, Tensor]:
    """A packed layer [out, in] of a shape and format, and an input [rows, in]; both random, the same ones each time."""
    drawn = generator(0, "latency")
    matrix, x = (torch.randn(n, layer.shape[1], generator=drawn, dtype=torch.float32) for n in (layer.shape[0], rows))
    packed = weights.of_model(DTYPE).quantize(matrix)
    inputs = layer.inputs
    rounds = None if inputs is None else ActivationQuantizer(inputs, inputs.fit(x) if inputs.static else None)
    made = QuantLinear(packed, None, rounds).standing_for(DTYPE).to(device)
    return made, x.to(device, DTYPE)


@torch.no_grad()
def seconds(layer: nn.Module, x: Tensor, calls: int) -> float:
    """The median over so many calls, each behind the end of the one before."""
    for _ in range(WARMING):
        layer(x)
    found = []
    for _ in range(calls):
        _wait(x)
        start = time.perf_counter()
        layer(x)
        _wait(x)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def _wait(x: Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize()


PART = Latency
