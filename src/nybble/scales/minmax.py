"""Asymmetric: the block's range, extended to hold 0, fills the format's range.

``symmetric=false`` on an integer format gives an integer zero point (section 7): S = (max - min) / (high - low),
z = clamp(round(low - min / S)). With ``offset=true`` the minimum itself is kept in the units of x, any format, and the
range is not extended (Q4_1): x_hat = S * (value - low) + min.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nybble.core.arithmetic import divided
from nybble.formats import NumberFormat
from nybble.scales import BlockParams, ScaleRule

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class MinMax(ScaleRule):
    """``offset``: keep a real offset instead of an integer zero point."""

    offset: bool = False

    @property
    def needs_integer(self) -> bool:  # noqa: D102
        return not self.offset

    @property
    def has_offset(self) -> bool:  # noqa: D102
        return self.offset

    def fit(self, blocks: Tensor, fmt: NumberFormat, rounding: str, weight: Tensor | None = None) -> BlockParams:  # noqa: D102
        return fit_range(*ends(blocks, weight), fmt, self.offset)


def ends(blocks: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each block, [blocks, 1]; what has weight 0 (padding) takes no part."""
    import torch

    if weight is None:
        return blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    real = weight > 0
    real = real | ~real.any(1, keepdim=True)  # of a block where nothing counts, all values do
    low = torch.where(real, blocks, torch.inf).amin(1, keepdim=True)
    return low, torch.where(real, blocks, -torch.inf).amax(1, keepdim=True)


def fit_range(low: Tensor, high: Tensor, fmt: NumberFormat, offset: bool) -> BlockParams:
    """Parameters that spread ``low .. high`` (float32 [blocks, 1]) over the format."""
    import torch

    from nybble.ops.blocks import safe_divisor

    if offset:
        scale = _divided(high, low, fmt.max - fmt.min)
        return BlockParams(scale, offset=low - scale * fmt.min)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = _divided(high, low, fmt.max - fmt.min)
    zero_point = torch.round(fmt.min - low / safe_divisor(scale)).clamp(fmt.min, fmt.max)
    return BlockParams(scale, zero_point=zero_point)


def _divided(high: Tensor, low: Tensor, span: float) -> Tensor:
    """``(high - low) / span``, also where the difference overflows, and at most float32's largest."""
    import torch

    width = high - low
    found = torch.where(width.isfinite(), divided(width, span), divided(high, span) - divided(low, span))
    real = low.isfinite() & high.isfinite()
    return torch.where(real, found.clamp(max=torch.finfo(torch.float32).max), found)


PART = MinMax
