"""Elastic activations: a scale and a threshold learn, one set of very few values for each place.

    rounded:  x_hat = a * round(clip((x - b) / a, Q_N, Q_P))          {0, a}  {0, a, 2a}  {-a, 0, a}
    signs:    x_hat = a * sign((x - b) / a)                           {-a, a}

With u = (x - b) / a, straight through the rounding:

==========  ====================================================  ==========================
            dx_hat/da                                             dx_hat/dx = -dx_hat/db
==========  ====================================================  ==========================
rounded     code - u where Q_N <= u <= Q_P, else Q_N or Q_P       1 where Q_N <= u <= Q_P, else 0
signs       sign(u), everywhere                                   1 where |u| <= 1, else 0
==========  ====================================================  ==========================

The set is the quantizer's format: ``uint1`` and ``uternary`` for what is never negative (softmax and ReLU outputs),
``binary``, ``ternary`` and ``int2_full`` for all else; more bits make it LSQ with a threshold. Where a begins the scale
rule says: ``scale=elastic`` as in the published code, on the batch that is shown first; b begins at 0.

Liu et al. 2022, "BiT: Robustly Binarized Multi-distilled Transformer", arXiv:2205.13016, eq. 8-11; without a threshold
(``threshold: none``) Liu et al. 2023, "Binary and Ternary Natural Language Generation" (TBT), arXiv:2306.01841. As in
their code the gradient of a, and not of b, is multiplied by g = 1 / sqrt(N Q_P), N being the elements of the tensor
(``gradient_factor: false`` is the text's), and a is never used below a floor, which gradients pass so that it can
recover.

Where we differ: sign(0) is +1, and the very ends of a range are inside it. TBT's text takes the mean of all activations
off signed ones; its code doesn't, and nor do we: a token would depend on its neighbours. BiT's code takes min(x) off
those without a sign in more than one bit: here a threshold may learn it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from nybble.core.errors import SchemeError
from nybble.formats.binary import BinaryFormat
from nybble.learned import ACTIVATIONS, Learned, Part
from nybble.learned._held import Held
from nybble.ops.grid import straight_through
from nybble.qtensor import QuantParams
from nybble.quantizer import Quantizer
from nybble.scales.one import One


class ElasticScale(Learned):
    """See the module.

    Args:
        quantizer: static, with one scale.
        params: to begin with; with a ``shift``, the threshold, where one learns.
        options: of the part.
    """

    def __init__(self, quantizer: Quantizer, params: QuantParams, options: Elastic) -> None:
        super().__init__(quantizer, ACTIVATIONS)
        self.options, self.held = options, Held(quantizer, params, ("scale", "shift"))

    @property
    def scale(self) -> nn.Parameter:
        """a: raw, float32, one value."""
        return self.held.get_parameter("scale")

    @property
    def threshold(self) -> nn.Parameter | None:
        """b: float32 [1], or one value for each index of the last dimension."""
        return self.held._parameters.get("shift")

    def _params(self, scale: Tensor) -> QuantParams:
        """Raw parameters with a in use: never below the floor, with its gradient all the same."""
        return replace(self.held.params(), scale=straight_through(scale.detach().clamp(min=self.options.floor), scale))

    def estimate(self, x: Tensor) -> Tensor:  # noqa: D102
        scale: Tensor = self.scale
        if self.options.gradient_factor:
            still = scale.detach()  # its value, exactly, with g times its gradient
            scale = still + (scale - still) / math.sqrt(x.numel() * _top(self.quantizer))
        params = self._params(scale)
        if isinstance(self.quantizer.format, BinaryFormat):  # of a sign the scale is a factor and no more
            assert isinstance(params.scale, Tensor)
            params = replace(params, divisor=params.scale.detach())
        return self.quantizer.soft(x, params)

    def settle(self, x: Tensor) -> QuantParams:  # noqa: D102
        return self.fixed()

    @torch.no_grad()
    def fixed(self) -> QuantParams:  # noqa: D102
        return self.quantizer.harden(self._params(self.scale))

    def groups(self) -> dict[str, list[nn.Parameter]]:  # noqa: D102
        threshold = self.threshold
        return {"scales": [self.scale], **({} if threshold is None else {"thresholds": [threshold]})}


def _top(quantizer: Quantizer) -> float:
    """Q_P."""
    return quantizer.format.max if quantizer.format.max > 0 else quantizer.format.absmax


@dataclass(frozen=True, kw_only=True)
class Elastic(Part):
    """Options of the method.

    Attributes:
        threshold: what has a learned threshold: all of a ``tensor`` together, each ``channel`` (index of the last
            dimension), or ``none``.
        gradient_factor: whether the gradient of a is multiplied by g.
        floor: smallest a that is ever used.
    """

    threshold: Literal["none", "tensor", "channel"] = "tensor"
    gradient_factor: bool = True
    floor: float = 1e-5

    sides = (ACTIVATIONS,)
    groups = ("scales", "thresholds")

    def __post_init__(self) -> None:
        if self.threshold not in ("none", "tensor", "channel"):
            raise SchemeError(f"elastic: threshold={self.threshold}; it is none, tensor or channel.")
        if not (math.isfinite(self.floor) and self.floor > 0):
            raise SchemeError(f"elastic: floor={self.floor:g} is the smallest scale, a positive number.")

    def check_more(self, quantizer: Quantizer, side: str) -> None:  # noqa: D102
        if not quantizer.static or quantizer.scale.takes_divisor:
            raise SchemeError(
                f"elastic learns one scale for all activations, and {quantizer} measures those of each tensor: write "
                "'tensor static', or learn it by ste."
            )
        if quantizer.granularity.factored or isinstance(quantizer.scale, One):
            raise SchemeError(
                f"elastic learns one scale, and {quantizer} has none, or factors; write 'tensor static' without "
                "scale=one."
            )

    def begin(self, quantizer: Quantizer, x: Tensor, start: QuantParams | None, side: str) -> Learned:  # noqa: D102
        params = quantizer.soften(quantizer.measured(x, start))
        scale = params.scale
        assert isinstance(scale, Tensor)
        if not (scale.isfinite().all() and (scale >= 0).all()):
            raise SchemeError(
                f"elastic can't begin at a scale of {scale.flatten()[0]:g} for {quantizer}: the activations hold NaN "
                "or Inf, or the scale rule gives a sign."
            )
        params = replace(params, scale=scale.clamp(min=self.floor), shift=self._first(params.shift, x))
        return ElasticScale(quantizer, params, self)

    def _first(self, given: Tensor | None, x: Tensor) -> Tensor | None:
        """The first b: zeros, or that of an earlier stage of training."""
        if self.threshold == "none":
            return None
        count = x.shape[-1] if self.threshold == "channel" and x.dim() else 1
        if given is None:
            return torch.zeros(count, dtype=torch.float32, device=x.device)
        if given.numel() not in (1, count):
            raise SchemeError(
                f"elastic: threshold={self.threshold} has {count} values here and can't begin with {given.numel()}; "
                f"choose threshold={'tensor' if self.threshold == 'channel' else 'channel'} for both stages."
            )
        return given.expand(count).clone()


PART = Elastic
