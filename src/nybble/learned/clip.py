"""Learned weight clipping: each block's scale comes from a learned share of its largest and smallest value.

    high = sigmoid(gamma) max(W)         low = sigmoid(beta) min(W)
    asymmetric:         scale = (high - low) / (code range),  zero point = round(-low / scale) (or offset = low)
    symmetric, floats:  scale = max(|high|, |low|) / (largest value of the format)

LWC of OmniQuant, Shao et al. 2023, arXiv:2308.13137, eq. 2. gamma and beta begin at 4: the range is sigmoid(4) =
0.982 of round-to-nearest's; that is the paper's, and ``start=30`` is round-to-nearest bit for bit. Gradients reach them
through the scale (and a real offset) only; the rounding of an integer zero point passes none. The weights may train
too: the range follows them.

Where we differ: a range that doesn't hold zero is extended to it and the zero point stays a code (the published code
lets both run free); a block of zeros gets scale 1 (0 in a format without a zero) instead of a
floor of 1e-5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nybble.core.errors import SchemeError
from nybble.learned import WEIGHTS, Learned, Part
from nybble.learned._share import shared_range
from nybble.ops.reaching import reaching
from nybble.qtensor import QTensor, QuantParams
from nybble.quantizer import Quantizer
from nybble.scales.absmax import AbsMax
from nybble.scales.minmax import MinMax


class LearnedRange(Learned):
    """See the module.

    Args:
        quantizer: with scale=absmax or minmax.
        x: the weight, for its shape.
        start: first gamma and beta.
    """

    def __init__(self, quantizer: Quantizer, x: Tensor, start: float) -> None:
        super().__init__(quantizer, WEIGHTS)
        shape = quantizer.granularity.scale_shape(x.shape)
        self.gamma = nn.Parameter(torch.full(shape, start, dtype=torch.float32, device=x.device))
        self.beta = nn.Parameter(torch.full(shape, start, dtype=torch.float32, device=x.device))

    def params(self, x: Tensor) -> QuantParams:
        """Raw parameters for the weight ``x``, with gradients to gamma, beta and x."""
        return shared_range(self.quantizer, x, torch.sigmoid(self.gamma), torch.sigmoid(self.beta))

    def estimate(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.estimate_in(x, x.dtype)

    def estimate_in(self, x: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: D102
        return self.quantizer.soft(x, self.params(x), reaching, dtype=dtype)

    @torch.no_grad()
    def settle(self, x: Tensor) -> QTensor:  # noqa: D102
        return self.quantizer.quantize(x, self.quantizer.harden(self.params(x)))

    def groups(self) -> dict[str, list[nn.Parameter]]:  # noqa: D102
        return {"clip": [self.gamma, self.beta]}


@dataclass(frozen=True, kw_only=True)
class Clip(Part):
    """``start``: first value of gamma and beta."""

    start: float = 4.0

    sides = (WEIGHTS,)
    groups = ("clip",)
    takes_start = False

    def __post_init__(self) -> None:
        if self.start < -8:
            raise SchemeError(f"clip: start={self.start:g} leaves next to nothing of a range; give -8 or more.")

    def check_more(self, quantizer: Quantizer, side: str) -> None:  # noqa: D102
        if not isinstance(quantizer.scale, AbsMax | MinMax):
            raise SchemeError(
                f"clip learns shares of a block's extremes, and scale={quantizer.scale} of {quantizer} finds its scale "
                "otherwise; use scale=absmax, or minmax (symmetric=false)."
            )
        if quantizer.granularity.factored or quantizer.center:
            raise SchemeError(
                f"clip learns a range for each block, and {quantizer} has none of its own; use channel, group, block, "
                "flat or tensor, without center."
            )

    def begin(self, quantizer: Quantizer, x: Tensor, start: QuantParams | None, side: str) -> Learned:  # noqa: D102
        return LearnedRange(quantizer, x, self.start)


PART = Clip
