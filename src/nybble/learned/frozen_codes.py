"""Frozen codes: scales and offsets learn, what every weight was rounded to stays.

    w_hat = s v + o,     v the value of the code,     dw_hat/ds = v,  dw_hat/do = 1

The last step of any method that decides the codes well and the scales less so: stage two of decoupleQ (Guo et al. 2024,
arXiv:2404.12759, section 3.4), the end-to-end phase of EfficientQAT (Chen et al. 2024, arXiv:2407.11062, section 3.3),
distillation of scales alone. Nothing but codes, scales and offsets is held: no float weight is needed.

Codes are those of the weight that it is made with: the nearest ones of a float weight, a solver's own where the weight
is that solver's ``dequantize()``. Zero points are whole numbers in the units of codes and stay too; where the range
itself should move, let the quantizer keep an offset. Scales are used as they are stored (16 bits, nested, powers of
two), with the gradient straight through; the outer scale of nested ones stays.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nybble.learned import WEIGHTS, Learned, Part
from nybble.learned._held import Held, check_own_scales
from nybble.ops.grid import Grid, straight_through
from nybble.qtensor import QTensor, QuantParams
from nybble.quantizer import Quantizer
from nybble.scales.pow2 import Pow2
from nybble.scales.pow2_ratio import Pow2Ratio
from nybble.soft import grid_of, through, unscaled

_TINY = 2.0**-126


class Exponents(nn.Parameter):
    """Logarithms to the base 2 of scales: half an octave leads to the next power of two, whatever the scale's size."""


class Frozen(Learned):
    """See the module.

    Args:
        quantizer: with a scale that is a tensor.
        codes: integers of the weight's shape, which stay.
        params: to begin with.
        octaves: learn logarithms of the scales (:class:`Exponents`) instead of these.
    """

    nearest = False

    def __init__(self, quantizer: Quantizer, codes: Tensor, params: QuantParams, octaves: bool = False) -> None:
        super().__init__(quantizer, WEIGHTS)
        self.held = Held(quantizer, params, ("offset",) if octaves else ("scale", "offset"))
        self.exponents: Exponents | None = None
        if octaves:
            scale = self.held.params().scale
            assert isinstance(scale, Tensor)
            self.exponents = Exponents(scale.detach().clamp_min(_TINY).log2())
        self.codes: Tensor
        self.register_buffer("codes", codes)

    def params(self) -> QuantParams:
        """Raw parameters, scales among those that the quantizer's rule could give; gradients go straight through."""
        params = self.held.params()
        if self.exponents is not None:
            params = replace(params, scale=self.exponents.exp2())
        assert isinstance(params.scale, Tensor)
        raw, rule = params.scale.detach(), self.quantizer.scale
        kept = rule.allowed(raw)
        if kept is raw:  # any will do
            return params
        kept = torch.where(torch.isfinite(kept), kept, rule.allowed(raw.clamp_min(_TINY)))  # no power of two below zero
        return replace(params, scale=straight_through(kept, params.scale))

    def estimate(self, x: Tensor) -> Tensor:
        """Values of the codes, of the shape and dtype of ``x``; no large tensor is kept for the gradient."""
        if self.quantizer.format.has_zero and x.numel():
            params = through(self.quantizer, self.params())
            made: Tensor = _Scaled.apply(self, params, tuple(x.shape), params.scale, params.offset)  # type: ignore[no-untyped-call]
            return made.to(x.dtype)
        codes = self.quantizer.granularity.to_blocks(self.codes)

        def decided(y: Tensor, grid: Grid) -> Tensor:
            return grid.decode(codes)

        return self.quantizer.soft(x.detach(), self.params(), decided)

    def settle(self, x: Tensor) -> QTensor:  # noqa: D102
        return self.quantizer.pack(self.codes, self.params())

    def groups(self) -> dict[str, list[nn.Parameter]]:  # noqa: D102
        return {"scales": list(self.parameters())}

    def values(self, params: QuantParams, shape: tuple[int, ...]) -> Tensor:
        """What the codes stand for, zero points taken off: float32 [blocks, elements]."""
        return grid_of(self.quantizer, params, shape).decode(self.quantizer.granularity.to_blocks(self.codes))


def has_powers(quantizer: Quantizer) -> bool:
    """Whether scales (or their ratios to a common one) are powers of two."""
    if isinstance(quantizer.scale, Pow2 | Pow2Ratio):
        return True
    if not isinstance(quantizer.scale_format, Quantizer):
        return False
    grid = quantizer.scale_format.format.grid
    return bool((grid[grid > 0][1:] == 2 * grid[grid > 0][:-1]).all())


class _Scaled(torch.autograd.Function):
    """``s v + o``, where v is decoded again for the gradient instead of being kept."""

    @staticmethod
    def forward(
        ctx: Any, frozen: Frozen, params: QuantParams, shape: tuple[int, ...], scale: Tensor, offset: Tensor | None
    ) -> Tensor:
        plain = replace(params, scale=scale, offset=offset)
        ctx.frozen, ctx.shape, ctx.params = frozen, shape, QuantParams(None, params.zero_point, grid=params.grid)
        ctx.shapes = scale.shape, None if offset is None else offset.shape
        granularity = frozen.quantizer.granularity
        return granularity.from_blocks(unscaled(frozen.values(plain, shape), plain, granularity, shape), shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        by_scale, by_offset = None, None
        asked, blocks = ctx.needs_input_grad[3:], ctx.frozen.quantizer.granularity.to_blocks(grads[0])
        if asked[0]:
            moved = blocks * ctx.frozen.values(ctx.params, ctx.shape)
            by_scale = _sums(moved, ctx.shapes[0])
        if asked[1]:
            by_offset = _sums(blocks, ctx.shapes[1])
        return None, None, None, by_scale, by_offset


def _sums(blocks: Tensor, shape: torch.Size) -> Tensor:
    """Of each block, or of all where they share one number."""
    found = blocks.sum(1) if shape.numel() > 1 or len(blocks) == 1 else blocks.sum()
    return found.reshape(shape)


@dataclass(frozen=True, kw_only=True)
class FrozenCodes(Part):
    """No options; the learning rate of scales and offsets is for the group ``scales``."""

    sides = (WEIGHTS,)
    groups = ("scales",)
    fixes_x = True
    keeps_codes = True

    def check_more(self, quantizer: Quantizer, side: str) -> None:  # noqa: D102
        check_own_scales("frozen-codes", quantizer)

    def begin(self, quantizer: Quantizer, x: Tensor, start: QuantParams | None, side: str) -> Learned:  # noqa: D102
        params = quantizer.measured(x, start)
        return Frozen(quantizer, quantizer.quantize(x, quantizer.harden(params)).unpacked(), params)


PART = FrozenCodes
