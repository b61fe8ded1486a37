"""Learned thresholds (N2UQ): activations are cut where it is best, and what comes out are evenly spaced levels.

Edges d_0 = s and d_i = s + a_1 + ... + a_i cut the axis of u = beta_1 x; the K thresholds are the middles between them:

    x_hat = scale * #{i : u >= d_(i-1) + a_i / 2}          0 ... K, K = 2^bits - 1

The gradient (G-STE) is that of the mean of stochastic rounding between the edges, m(u) = sum_i clip((u - d_(i-1)) /
a_i, 0, 1). For u in [d_(i-1), d_i), and 0 for all of them elsewhere:

    dm/du = 1 / a_i    dm/ds = -1 / a_i    dm/da_i = -(u - d_(i-1)) / a_i^2    dm/da_j = -1 / a_i for j < i, 0 for j > i

Widths that are all alike make it straight through. The gradient of ``scale`` is the count; nothing is divided by the
number of elements: a rate a tenth of the others' (``rates: {inputs.thresholds: 0.1, inputs.scales: 0.1}``) does that.

Liu et al. 2022, "Nonuniform-to-Uniform Quantization: Towards Accurate Quantization via Generalized Straight-Through
Estimation", arXiv:2111.14826, eq. 5-9. What is stored are codes of an ordinary format, and K thresholds in units of the
scale, (d_(i-1) + a_i / 2) / (beta_1 scale), in place of its tie rule.

Where we differ: the start is round-to-nearest under the quantizer's own first scale, on the batch that is shown first
(``scale=fixed(value=...)`` for 2 / K: the published code cuts [0, 2]). A width is never used below ``floor``, and its
gradient passes there, where that of the code is blocked and the width may stay for good. Widths are learned in units of
the first scale, and so is s: a rate means the same whatever the activations' range.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.errors import SchemeError
from nybble.core.shapes import Float
from nybble.learned import ACTIVATIONS, Learned, Part
from nybble.ops.grid import straight_through
from nybble.qtensor import QuantParams
from nybble.quantizer import Quantizer
from nybble.scales.one import One

_MOST = 16
"""Levels: each of them costs the backward a pass over the activations."""


class LearnedThresholds(Learned):
    """See the module.

    Args:
        quantizer: static, of evenly spaced levels.
        params: to begin with, of which the scale is taken.
        options: of the part.
    """

    def __init__(self, quantizer: Quantizer, params: QuantParams, options: Thresholds) -> None:
        super().__init__(quantizer, ACTIVATIONS)
        self.options = options
        raw = quantizer.soften(params).scale
        assert isinstance(raw, Tensor)
        self.scale = nn.Parameter(raw.reshape(-1))
        self.register_buffer("unit", raw.reshape(-1).clone())
        self.start = nn.Parameter(torch.full_like(self.scale, quantizer.format.min))
        self.widths = nn.Parameter(torch.ones(len(quantizer.format.grid) - 1, device=raw.device))
        self.gain = nn.Parameter(torch.ones_like(self.scale))

    def _held_up(self, value: Tensor) -> Tensor:
        """Never below the floor, with the gradient all the same."""
        return straight_through(value.detach().clamp(min=self.options.floor), value)

    def estimate(self, x: Tensor) -> Tensor:  # noqa: D102
        values = self.rounded(x).float()
        scale, widths = self._held_up(self.scale), self._held_up(self.widths)
        u = self._held_up(self.gain) * (x.float() / self.get_buffer("unit"))
        mean = mean_level(u, self.start, widths)
        surrogate = scale.detach() * mean + scale * (values / scale.detach())
        return straight_through(values, surrogate).to(x.dtype)

    def settle(self, x: Tensor) -> QuantParams:  # noqa: D102
        return self.fixed()

    @torch.no_grad()
    def fixed(self) -> QuantParams:  # noqa: D102
        scale, widths, gain = (self._held_up(p) for p in (self.scale, self.widths, self.gain))
        lower = self.start + widths.cumsum(0) - widths  # d_0 ... d_(K-1)
        middles = (lower + widths / 2) * (self.get_buffer("unit") / (gain * scale))
        return self.quantizer.harden(QuantParams(scale, thresholds=middles))

    def groups(self) -> dict[str, list[nn.Parameter]]:  # noqa: D102
        return {"scales": [self.scale], "thresholds": [self.start, self.widths, self.gain]}


def mean_level(
    u: Float[Tensor, "*shape"], start: Float[Tensor, " one"], widths: Float[Tensor, " steps"]
) -> Float[Tensor, "*shape"]:
    """``sum_i clip((u - d_(i-1)) / a_i, 0, 1)``, with the gradient of the module's table to all three.

    Args:
        u: any shape.
        start: s.
        widths: a, above 0.
    """
    found: Tensor = _MeanLevel.apply(u, start, widths)  # type: ignore[no-untyped-call]
    return found


class _MeanLevel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, start: Tensor, widths: Tensor) -> Tensor:
        edges = torch.cat([start, start + widths.cumsum(0)])
        at = torch.bucketize(u, edges, right=True) - 1  # i - 1; -1 below, K beyond
        inside = (at >= 0) & (at < len(widths))
        own = at.clamp(0, len(widths) - 1)
        share = torch.where(inside, (u - edges[own]) / widths[own], 0.0)
        ctx.save_for_backward(torch.where(inside, at, -1), share, widths)
        return at.clamp(0, len(widths)).to(u.dtype) + share

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        at, share, widths = ctx.saved_tensors
        inside = at >= 0
        to_u = torch.where(inside, gradient / widths[at.clamp(min=0)], 0.0)
        pushed, stretched = torch.zeros_like(widths), torch.zeros_like(widths)
        for i in range(len(widths)):  # sums in the same order wherever they are made, unlike index_add
            here = torch.where(at == i, to_u, 0.0)
            pushed[i], stretched[i] = here.sum(), (here * share).sum()
        behind = pushed.flip(0).cumsum(0).flip(0) - pushed  # of all further intervals, which a wider one moves
        return to_u, -pushed.sum().reshape(1), -stretched - behind


@dataclass(frozen=True, kw_only=True)
class Thresholds(Part):
    """Options of the method.

    Attributes:
        floor: smallest width, gain and scale that are ever used, in units of the first scale.
    """

    floor: float = 1e-3

    sides = (ACTIVATIONS,)
    groups = ("scales", "thresholds")

    def __post_init__(self) -> None:
        if not self.floor > 0:
            raise SchemeError(f"thresholds: floor={self.floor:g} is the smallest width; give one above 0.")

    def check_more(self, quantizer: Quantizer, side: str) -> None:  # noqa: D102
        if not quantizer.static or str(quantizer.granularity) != "tensor" or quantizer.scale.takes_divisor:
            raise SchemeError(
                f"thresholds learns where all activations are cut, and {quantizer} measures those of each tensor, or "
                "of parts of it: write 'tensor static', or learn it by ste."
            )
        grid = quantizer.format.grid
        if len(grid) > _MOST or set((grid[1:] - grid[:-1]).tolist()) != {1.0}:
            raise SchemeError(
                f"thresholds learns {_MOST - 1} thresholds or fewer between levels a step apart, and {quantizer} has "
                "more, or other levels; use uint1 to uint4, int2 to int4, or elastic for more bits."
            )
        own = quantizer.scale
        if own.needs_integer or own.has_offset or quantizer.center or isinstance(own, One):
            raise SchemeError(
                f"thresholds moves what zero points and offsets would, beside a scale: leave symmetric=false, offset, "
                f"center and scale=one out of {quantizer}."
            )

    def begin(self, quantizer: Quantizer, x: Tensor, start: QuantParams | None, side: str) -> Learned:  # noqa: D102
        params = quantizer.measured(x, start)
        scale = quantizer.soften(params).scale
        assert isinstance(scale, Tensor)
        if not (scale.isfinite().all() and (scale > 0).all()):
            raise SchemeError(
                f"thresholds can't begin at a scale of {scale.flatten()[0]:g} for {quantizer}: the activations hold "
                "NaN or Inf, or the scale rule gives a sign."
            )
        return LearnedThresholds(quantizer, params, self)


PART = Thresholds
