"""SignRound: an offset for every rounding and a share of every range, made for signed gradients (AutoRound).

    w_hat = s clamp(round(w / s + V)),     V in -0.5 .. 0.5, beginning at 0
    high = alpha max(W), low = beta min(W),     alpha, beta in ``least`` .. 1, beginning at 1
    asymmetric:         s = (high - low) / (code range), zero point = round(-low / s) (or offset = low)
    symmetric, floats:  s = max(|high|, |low|) / (largest value of the format)

Cheng et al. 2023, "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs",
arXiv:2309.05516, eq. 3-5; the gradient passes round() straight through, and 0 outside the range. Meant for the engine's
``optimizer: sign``: 200 steps with a rate of 1/200 that falls in a line move V by at most 0.5 in all.

Where we differ: bounds hold what is used and stored, while gradients reach what is learned also beyond them, so that
nothing is stuck there. Any format: round() is to the grid's own value, and V counts in steps of the grid around w / s,
which of integers is 1. A scale rule that has no range (mse, pow2, mean ...) keeps its scale, times alpha.

"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nybble.core.errors import SchemeError
from nybble.learned import WEIGHTS, Learned, Part
from nybble.learned._held import Held
from nybble.learned._share import has_range, shared_range
from nybble.ops.grid import straight_through
from nybble.ops.reaching import Reaching
from nybble.qtensor import QTensor, QuantParams
from nybble.quantizer import Quantizer
from nybble.scales.one import One


class Shifted(Learned):
    """See the module.

    Args:
        quantizer: the specification.
        x: the weight.
        least: of alpha and beta.
    """

    nearest = False

    def __init__(self, quantizer: Quantizer, x: Tensor, least: float) -> None:
        super().__init__(quantizer, WEIGHTS)
        self.least = least
        self.held = None if has_range(quantizer) else Held(quantizer, quantizer.measured(x, None))
        shape = quantizer.granularity.scale_shape(x.shape)
        self.v = nn.Parameter(torch.zeros(x.shape, dtype=torch.float32, device=x.device))
        self.alpha = nn.Parameter(torch.ones(shape, dtype=torch.float32, device=x.device))
        self.beta = None
        if self.held is None:
            self.beta = nn.Parameter(torch.ones(shape, dtype=torch.float32, device=x.device))

    def params(self, x: Tensor) -> QuantParams:
        """Raw parameters for the weight ``x``, with gradients to the shares."""
        upper = _within(self.alpha, self.least, 1.0)
        if self.held is None:
            assert self.beta is not None
            return shared_range(self.quantizer, x, upper, _within(self.beta, self.least, 1.0))
        params = self.held.params()
        assert isinstance(params.scale, Tensor)
        return replace(params, scale=params.scale * upper)

    def _round(self) -> Reaching:
        return Reaching(self.quantizer.granularity.to_blocks(_within(self.v, -0.5, 0.5)))

    def estimate(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.quantizer.soft(x, self.params(x), self._round())

    @torch.no_grad()
    def settle(self, x: Tensor) -> QTensor:  # noqa: D102
        return self.quantizer.settle(x, self.params(x), self._round())

    def groups(self) -> dict[str, list[nn.Parameter]]:  # noqa: D102
        return {"rounding": [self.v], "clip": [p for p in (self.alpha, self.beta) if p is not None]}


def _within(value: Tensor, low: float, high: float) -> Tensor:
    """Held between two bounds; the gradient goes through as if it weren't."""
    return straight_through(value.detach().clamp(low, high), value)


@dataclass(frozen=True, kw_only=True)
class SignRound(Part):
    """``least``: the smallest share of a range."""

    least: float = 0.5

    sides = (WEIGHTS,)
    groups = ("rounding", "clip")
    takes_start = False

    def __post_init__(self) -> None:
        if not 0 <= self.least < 1:
            raise SchemeError(f"sign-round: least is a share of a range, 0 to below 1; got {self.least:g}.")

    def check_more(self, quantizer: Quantizer, side: str) -> None:  # noqa: D102
        if quantizer.floor:
            raise SchemeError(
                f"sign-round moves weights towards zero too, and {quantizer} stores nothing below its floor; leave "
                "floor out."
            )
        if quantizer.granularity.factored or isinstance(quantizer.scale, One):
            raise SchemeError(
                f"sign-round learns a share of each block's scale, and {quantizer} has no scale for a block; use "
                "tensor, channel, group, block or flat with a scale, or learn the rounding alone by flexround."
            )

    def begin(self, quantizer: Quantizer, x: Tensor, start: QuantParams | None, side: str) -> Learned:  # noqa: D102
        return Shifted(quantizer, x, self.least)


PART = SignRound
