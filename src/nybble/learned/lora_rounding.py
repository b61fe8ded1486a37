"""LoRA-Rounding: AdaRound's variable as a product of two thin matrices, learned together with the scales (CBQ).

    w_hat = s clamp(floor(w / s) + h(V)),     V = V0 + A1 A2,     h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1)
    penalty: strength sum(1 - |2 h - 1|^beta), beta annealed down

Ding et al. 2023, "CBQ: Cross-Block Quantization for Large Language Models", arXiv:2312.07950. A1 [out, rank] begins
Gaussian, A2 [rank, in] at zero: (out + in) rank numbers learn instead of out in. The gradient of s goes through floor
straight, and through the product; none in the clipped part. Once settled, V >= 0 is up.

``start: half`` is the paper's, V0 = 0: every weight begins half a step above its lower neighbour, no rounding that
makes sense until the penalty has decided. ``start: nearest`` is ours: V0 is the weight's own fraction under the scales
as they are by now, h is 0 or 1 already in training (its gradient that of the formula above), and there is no penalty:
few numbers can't decide for every weight, but turn what lies near the middle. So it begins at round-to-nearest, and a
scale that learns takes the nearest roundings with it: a V0 that stays would turn w / s past a whole number up twice.

Where we differ: any format, floor(w / s) and floor(w / s) + 1 being the values of its grid around w / s.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor, nn

from nybble.core.errors import SchemeError
from nybble.learned import WEIGHTS, Learned, Part
from nybble.learned._fraction import logits_between
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

    nearest = False

    def __init__(self, quantizer: Quantizer, x: Tensor, params: QuantParams, options: LoraRounding) -> None:
        super().__init__(quantizer, WEIGHTS)
        self.held, self.options = Held(quantizer, params, ("scale",)), options
        rows, columns = x.shape[0], x[0].numel()
        rank = min(options.rank, rows, columns)
        generator = torch.Generator().manual_seed(rank)  # of its own: torch's random state stays
        first = torch.randn(rows, rank, generator=generator, dtype=torch.float32)
        self.a1 = nn.Parameter(first.to(x.device))
        self.a2 = nn.Parameter(torch.zeros(rank, columns, dtype=torch.float32, device=x.device))
        self._shape = tuple(x.shape)

    def product(self) -> Tensor:
        """A1 A2: float32, shape of the weight."""
        with torch.autocast(self.a1.device.type, enabled=False):
            return (self.a1 @ self.a2).reshape(self._shape)

    def estimate(self, x: Tensor) -> Tensor:  # noqa: D102
        product = self.quantizer.granularity.to_blocks(self.product())

        def between(y: Tensor, grid: Grid) -> Tensor:
            lower, upper = grid.neighbours(y)
            floor = straight_through(lower, grid.clamp(y))
            if self.options.start == "half":
                return floor + rectified(product) * (upper - lower)
            v = logits_between(y.detach(), grid, lower, upper) + product
            return floor + straight_through((v.detach() >= 0).float(), rectified(v)) * (upper - lower)

        return self.quantizer.soft(x.detach(), self.held.params(), between)

    def settle(self, x: Tensor) -> QTensor:  # noqa: D102
        product = self.quantizer.granularity.to_blocks(self.product().detach())

        def decided(y: Tensor, grid: Grid) -> Tensor:
            lower, upper = grid.neighbours(y)
            v = product if self.options.start == "half" else logits_between(y, grid, lower, upper) + product
            return torch.where(v >= 0, upper, lower)

        return self.quantizer.settle(x, self.held.params(), decided)

    def penalty(self, t: float | Tensor) -> Tensor:  # noqa: D102
        return self.options.term(rectified(self.product()), t) if self.options.start == "half" else super().penalty(t)

    def groups(self) -> dict[str, list[nn.Parameter]]:  # noqa: D102
        return {"rounding": [self.a1, self.a2], "scales": [self.held.get_parameter("scale")]}


@dataclass(frozen=True, kw_only=True)
class LoraRounding(Deciding, Part):
    """Options of the method.

    Attributes:
        rank: columns of A1; of a layer with fewer rows or columns, as many as these.
        start: ``nearest`` or ``half``; strength, beta and warmup are of the latter's penalty.
    """

    rank: int = 5
    start: Literal["nearest", "half"] = "nearest"

    sides = (WEIGHTS,)
    groups = ("rounding", "scales")
    fixes_x = True

    @property
    def soft(self) -> bool:  # type: ignore[override]
        """Whether training gives values between those that are stored."""
        return self.start == "half"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise SchemeError(f"lora-rounding: rank={self.rank}; a product has 1 or more.")
        self.check_penalty("lora-rounding")
        if self.start == "nearest" and any(getattr(self, f.name) != f.default for f in fields(Deciding)):
            raise SchemeError(
                "lora-rounding: strength, beta_start, beta_end and warmup are of a penalty that start=nearest, which "
                "rounds already in training, does not have; add start=half, or leave them out."
            )

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
