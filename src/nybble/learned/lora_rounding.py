"""LoRA-Rounding: AdaRound's variable as a product of two thin matrices, learned together with the scales (CBQ).

    w_hat = s clamp(floor(w / s) + h(V)),     V = V0 + A1 A2,     h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1)
    penalty: strength sum(1 - |2 h - 1|^beta), beta annealed down

Ding et al. 2023, "CBQ: Cross-Block Quantization for Large Language Models", arXiv:2312.07950. A1 [out, rank] begins
Gaussian, A2 [rank, in] at zero: (out + in) rank numbers learn instead of out in. The gradient of s goes through floor
straight, and through the product; none in the clipped part. Once settled, V >= 0 is up.

``start: half`` is the paper's start, V0 = 0: every weight half a step above its lower neighbour, no rounding that makes
sense until it is trained. ``start: nearest`` is ours: V0 is the weight's own fraction, so that training begins at the
float weight and settles to round-to-nearest at the start, as AdaRound does; what is learned then is which roundings
to turn.

Where we differ: any format, floor(w / s) and floor(w / s) + 1 being the values of its grid around w / s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from nybble.core.errors import SchemeError
from nybble.learned import WEIGHTS, Learned, Part
from nybble.learned._fraction import fractions
from nybble.learned._held import Held, check_own_scales
from nybble.learned._rectified import Deciding, rectified
from nybble.ops.grid import Grid, straight_through
from nybble.qtensor import QTensor, QuantParams
from nybble.quantizer import Quantizer


class LowRankUpOrDown(Learned):
    """See the module.

    Args:
        quantizer: with a scale that is a tensor.
        x: the weight, fixed from now on.
        params: to begin with.
        options: of the part.
    """

    def __init__(self, quantizer: Quantizer, x: Tensor, params: QuantParams, options: LoraRounding) -> None:
        super().__init__(quantizer, WEIGHTS)
        self.held, self.options = Held(quantizer, params, ("scale",)), options
        rows, columns = x.shape[0], x[0].numel()
        rank = min(options.rank, rows, columns)
        generator = torch.Generator().manual_seed(rank)  # of its own: torch's random state stays
        first = torch.randn(rows, rank, generator=generator, dtype=torch.float32)
        self.a1 = nn.Parameter(first.to(x.device))
        self.a2 = nn.Parameter(torch.zeros(rank, columns, dtype=torch.float32, device=x.device))
        begin = fractions(quantizer, x, self.held.params())[0] if options.start == "nearest" else None
        self.v0: Tensor | None
        self.register_buffer("v0", begin)
        self._shape = tuple(x.shape)

    def v(self) -> Tensor:
        """V: float32, shape of the weight."""
        with torch.autocast(self.a1.device.type, enabled=False):
            product = (self.a1 @ self.a2).reshape(self._shape)
        return product if self.v0 is None else self.v0 + product

    def estimate(self, x: Tensor) -> Tensor:  # noqa: D102
        h = self.quantizer.granularity.to_blocks(rectified(self.v()))

        def between(y: Tensor, grid: Grid) -> Tensor:
            lower, upper = grid.neighbours(y)
            floor = straight_through(lower, grid.clamp(y))
            return floor + h * (upper - lower)

        return self.quantizer.soft(x.detach(), self.held.params(), between)

    def settle(self, x: Tensor) -> QTensor:  # noqa: D102
        up = self.quantizer.granularity.to_blocks((self.v().detach() >= 0).float()) > 0

        def decided(y: Tensor, grid: Grid) -> Tensor:
            lower, upper = grid.neighbours(y)
            return torch.where(up, upper, lower)

        return self.quantizer.settle(x, self.held.params(), decided)

    def penalty(self, t: float | Tensor) -> Tensor:  # noqa: D102
        return self.options.term(rectified(self.v()), t)

    def groups(self) -> dict[str, list[nn.Parameter]]:  # noqa: D102
        return {"rounding": [self.a1, self.a2], "scales": [self.held.get_parameter("scale")]}


@dataclass(frozen=True, kw_only=True)
class LoraRounding(Deciding, Part):
    """Options of the method.

    Attributes:
        rank: columns of A1; of a layer with fewer rows or columns, as many as these.
        start: ``nearest`` or ``half``.
    """

    rank: int = 5
    start: Literal["nearest", "half"] = "nearest"

    sides = (WEIGHTS,)
    groups = ("rounding", "scales")
    fixes_x = True
    soft = True

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise SchemeError(f"lora-rounding: rank={self.rank}; a product has 1 or more.")
        self.check_penalty("lora-rounding")

    def check_more(self, quantizer: Quantizer, side: str) -> None:  # noqa: D102
        if quantizer.floor:
            raise SchemeError(
                f"lora-rounding rounds up or down, also to zero, and {quantizer} stores nothing below its floor; leave "
                "floor out."
            )
        check_own_scales("lora-rounding", quantizer, "adaround")

    def begin(self, quantizer: Quantizer, x: Tensor, start: QuantParams | None, side: str) -> Learned:  # noqa: D102
        if start is not None and start.thresholds is not None:
            raise SchemeError(
                f"lora-rounding decides for each weight; a start with thresholds of {quantizer} does it too."
            )
        return LowRankUpOrDown(quantizer, x, quantizer.measured(x, start), self)


PART = LoraRounding
