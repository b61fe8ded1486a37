"""AdaRound: each weight goes to the value below or above it, whichever helps the layer's output.

    w_hat = s (lower + h(V) (upper - lower))       h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1)
    penalty: lambda sum(1 - |2 h(V) - 1|^beta),    beta annealed from 20 to 2 after a warm-up without it

Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization", arXiv:2004.10568, eq. 21-25. lower
and upper are the neighbours of w / s on the format's grid: floor and floor + 1 of integers, of a float the values
around it. V begins at the weight's own fraction, so that training begins AT the float weight (clipped), not at
round-to-nearest; once settled, V >= 0 is up, and at the start that is round-to-nearest.

``scale_aware``: FP4DiT's form for float grids (Chen et al. 2025, arXiv:2503.15465, section C), h(V / step) with step =
s (upper - lower): the gradient of V then no longer carries the step, which differs from weight to weight.

Where we differ: a tie at the start goes as the quantizer's rounding says. Scales, zero points and offsets are fixed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nybble.core.errors import SchemeError
from nybble.learned import WEIGHTS, Learned, Part
from nybble.learned._fraction import fractions
from nybble.learned._held import Held
from nybble.learned._rectified import Deciding, rectified
from nybble.ops.grid import Grid
from nybble.qtensor import QTensor, QuantParams, scale_blocks
from nybble.quantizer import Quantizer


class UpOrDown(Learned):
    """See the module.

    Args:
        quantizer: the specification.
        x: the weight, fixed from now on: V is the fraction between its neighbours.
        params: scale, zero point and offset.
        options: of the part.
    """

    nearest = False

    def __init__(self, quantizer: Quantizer, x: Tensor, params: QuantParams, options: AdaRound) -> None:
        super().__init__(quantizer, WEIGHTS)
        self.held, self.options = Held(quantizer, params), options
        v, step = self._begin(x)
        self.v = nn.Parameter(v * step)
        self.step: Tensor | None
        self.register_buffer("step", step if options.scale_aware else None)

    def _begin(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """V / step that makes h the weight's fraction, and the step (1 unless scale-aware); both of the shape of x."""
        v, gap = fractions(self.quantizer, x, self.held.params())
        if not self.options.scale_aware:
            return v, torch.ones_like(gap)
        scale, granularity, shape = self.quantizer.harden(self.held.params()).scale, self.quantizer.granularity, x.shape
        if scale is None:
            return v, gap
        blocks = scale_blocks(granularity.to_blocks(gap), scale, granularity, tuple(shape)).abs()
        return v, granularity.from_blocks(blocks, tuple(shape))

    def h(self) -> Tensor:
        """0 (down) to 1 (up) for each weight; float32, shape of the weight."""
        return rectified(self.v if self.step is None else self.v / self.step)

    def estimate(self, x: Tensor) -> Tensor:  # noqa: D102
        h = self.quantizer.granularity.to_blocks(self.h())

        def between(y: Tensor, grid: Grid) -> Tensor:
            lower, upper = grid.neighbours(y)
            return lower + h * (upper - lower)

        return self.quantizer.soft(x, self.held.params(), between)

    def settle(self, x: Tensor) -> QTensor:  # noqa: D102
        up = self.quantizer.granularity.to_blocks((self.v.detach() >= 0).float()) > 0

        def decided(y: Tensor, grid: Grid) -> Tensor:
            lower, upper = grid.neighbours(y)
            return torch.where(up, upper, lower)

        return self.quantizer.settle(x, self.held.params(), decided)

    def penalty(self, t: float | Tensor) -> Tensor:  # noqa: D102
        return self.options.term(self.h(), t)

    def groups(self) -> dict[str, list[nn.Parameter]]:  # noqa: D102
        return {"rounding": [self.v]}


@dataclass(frozen=True, kw_only=True)
class AdaRound(Deciding, Part):
    """Options of the method.

    Attributes:
        warmup: the share of training without the penalty.
        scale_aware: FP4DiT's form.
    """

    warmup: float = 0.2
    scale_aware: bool = False

    sides = (WEIGHTS,)
    groups = ("rounding",)
    fixes_x = True
    soft = True

    def __post_init__(self) -> None:
        self.check_penalty("adaround")

    def check_more(self, quantizer: Quantizer, side: str) -> None:  # noqa: D102
        if quantizer.floor:
            raise SchemeError(
                f"adaround rounds up or down, also to zero, and {quantizer} stores nothing below its floor; leave "
                "floor out."
            )

    def begin(self, quantizer: Quantizer, x: Tensor, start: QuantParams | None, side: str) -> Learned:  # noqa: D102
        if start is not None and start.thresholds is not None:
            raise SchemeError(f"adaround decides for each weight; a start with thresholds of {quantizer} does it too.")
        return UpOrDown(quantizer, x, quantizer.measured(x, start), self)


PART = AdaRound
