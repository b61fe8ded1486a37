"""Fake quantization that gradients pass, in one operation forward and one backward.

    y = x / scale [+ shift * gap(y)]        x_hat = scale * (round(y) - zero_point)

    dL/dy = scale dL/dx_hat  from one end of the range to the other, 0 outside
    dL/dx = dL/dy / scale,   dL/dshift = gap dL/dy,   dL/dscale = sum of values dL/dx_hat - (x / scale^2) dL/dy

What the steps of :func:`nybble.soft.soft` come to one by one, bit for bit but for the order in which a scale's gradient
is summed; nothing of the size of x is kept but x itself. ``gap`` is the distance of the grid's values around y, 1
beyond the range.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nybble.core.shapes import Float, Float32
from nybble.formats import get_format
from nybble.ops.blocks import safe_divisor, scaled_round
from nybble.ops.rounding import round_to, round_to_codes
from nybble.ops.tables import neighbours


def gap(y: Tensor, fmt: str) -> Tensor | float:
    """The distance of the two values of the format around each y; 1 beyond the range, where there is one only."""
    form = get_format(fmt)
    if form.in_ones:
        return 1.0
    lower, upper = neighbours(y, form)
    return torch.where(upper > lower, upper - lower, 1.0)


@torch.library.custom_op(
    "nybble::straight_round",
    mutates_args=(),
    schema=(
        "(Tensor blocks, Tensor scale, Tensor? zero, Tensor? shift, str fmt, str rounding, ScalarType? dtype=None) "
        "-> Tensor"
    ),
)
def straight_round(
    blocks: Float[Tensor, "blocks elements"],
    scale: Float32[Tensor, "blocks 1"],
    zero: Float32[Tensor, "blocks 1"] | None,
    shift: Float32[Tensor, "blocks elements"] | None,
    fmt: str,
    rounding: str,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "blocks elements"]:
    """As :func:`nybble.ops.blocks.scaled_round`, with integer zero points, and with what training adds before rounding.

    Args:
        blocks: float32, float16 or bfloat16, [blocks, elements].
        scale: float32 [blocks, 1].
        zero: whole numbers, float32 [blocks, 1], in the units of codes, of an integer format.
        shift: float32 [blocks, elements], in steps of the grid.
        fmt: name of the format.
        rounding: name of a deterministic rounding (with zero points not ``native``).
        dtype: a narrower one to round the result to; None: that of ``blocks``.

    Returns:
        shape of ``blocks``; what it would be in their dtype, then cast.
    """
    values = _values(_shifted(blocks, scale, shift, fmt)[0], zero, fmt, rounding)
    return (values * scale).to(blocks.dtype).to(dtype or blocks.dtype)


@straight_round.register_fake
def _(
    blocks: Tensor, scale: Tensor, zero: Tensor | None, shift: Tensor | None, fmt: str, rounding: str,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    return blocks.new_empty(blocks.shape, dtype=dtype)


@torch.library.custom_op(
    "nybble::straight_round_backward",
    mutates_args=(),
    schema=(
        "(Tensor gradient, Tensor blocks, Tensor scale, Tensor? zero, Tensor? shift, str fmt, str rounding, bool far, "
        "bool for_blocks, bool for_scale, float share=1.0) -> (Tensor, Tensor, Tensor)"
    ),
)
def straight_round_backward(
    gradient: Float[Tensor, "blocks elements"],
    blocks: Float[Tensor, "blocks elements"],
    scale: Float32[Tensor, "blocks 1"],
    zero: Float32[Tensor, "blocks 1"] | None,
    shift: Float32[Tensor, "blocks elements"] | None,
    fmt: str,
    rounding: str,
    far: bool,
    for_blocks: bool,
    for_scale: bool,
    share: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of blocks, scale and shift in :func:`straight_round`.

    Args:
        gradient: of its result, in its dtype.
        blocks: as there, and so on to ``rounding``.
        scale: as there.
        zero: as there.
        shift: as there.
        fmt: as there.
        rounding: as there.
        far: the range goes on for half a step beyond its ends (what rounds to them before it saturates).
        for_blocks: whether the gradient of blocks is wanted.
        for_scale: whether that of the scale is.
        share: what that is multiplied with.

    Returns:
        in the dtype of ``blocks`` [blocks, elements]; float32 [blocks, 1]; float32 [blocks, elements]; of what isn't
        wanted (of the shift where there is none), empty.
    """
    y, distance = _shifted(blocks, scale, shift, fmt)
    low, high = ends(fmt, zero, far)
    wide = gradient.float()
    passed = torch.where((y >= low) & (y <= high), wide * scale, 0.0)
    by = safe_divisor(scale)
    to_blocks = (passed / by).to(blocks.dtype) if for_blocks else blocks.new_empty(0)
    to_scale = scale.new_empty(0)
    if for_scale:
        through = (-passed * (blocks.float() / by / by)).sum(1, keepdim=True)
        to_scale = (wide * _values(y, zero, fmt, rounding)).sum(1, keepdim=True)
        to_scale = (to_scale + torch.where(scale == 0, 0.0, through)) * share
    to_shift = scale.new_empty(0) if shift is None else (passed * distance).contiguous()
    return to_blocks.contiguous(), to_scale, to_shift


@straight_round_backward.register_fake
def _(
    gradient: Tensor, blocks: Tensor, scale: Tensor, zero: Tensor | None, shift: Tensor | None, fmt: str, rounding: str,
    far: bool, for_blocks: bool, for_scale: bool, share: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        blocks.new_empty(blocks.shape if for_blocks else 0),
        scale.new_empty(scale.shape if for_scale else 0),
        scale.new_empty(0 if shift is None else blocks.shape),
    )


def ends(fmt: str, zero: Tensor | None, far: bool) -> tuple[Tensor, Tensor] | tuple[float, float]:
    """Between what y passes its gradient, both included: numbers, or with zero points float32 [blocks, 1]."""
    form = get_format(fmt)
    if zero is None:
        return form.reach if far else (form.min, form.max)
    low, high = form.min - zero, form.max - zero
    return (low - 0.5, high + 0.5) if far else (low, high)


def _shifted(blocks: Tensor, scale: Tensor, shift: Tensor | None, fmt: str) -> tuple[Tensor, Tensor | float]:
    """``y`` and the gap in whose units it was shifted."""
    y = (blocks.float() / safe_divisor(scale)).contiguous()
    if shift is None:
        return y, 1.0
    distance = gap(y, fmt)
    return y + (shift if isinstance(distance, float) else shift * distance), distance


def _values(y: Tensor, zero: Tensor | None, fmt: str, rounding: str) -> Tensor:
    if zero is None:
        found: Tensor = round_to(y, fmt, rounding)
        return found
    form = get_format(fmt)
    return round_to_codes(y, zero, form.min, form.max, rounding) - zero


@dataclass(frozen=True)
class How:
    """What isn't a tensor.

    Attributes:
        fmt, rounding: by name. far, share: as :func:`straight_round_backward` has them.
        dtype: of the result, rounded to that of the blocks and then to this; None: that of the blocks.
    """

    fmt: str
    rounding: str
    far: bool
    share: float = 1.0
    dtype: torch.dtype | None = None


def round_straight(blocks: Tensor, scale: Tensor, zero: Tensor | None, shift: Tensor | None, how: How) -> Tensor:
    """:func:`straight_round` with gradients to blocks, scale and shift; zero points get none."""
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in (blocks, scale, shift)):
        return _forward(blocks, scale, zero, shift, how)
    found: Tensor = _Straight.apply(blocks, scale, zero, shift, how)  # type: ignore[no-untyped-call]
    return found


def _forward(blocks: Tensor, scale: Tensor, zero: Tensor | None, shift: Tensor | None, how: How) -> Tensor:
    found: Tensor
    plain, cast = zero is None and shift is None, how.dtype not in (None, blocks.dtype)
    if plain and not (cast and blocks.is_cuda):  # there is one pass over memory for both; elsewhere two are faster
        found = scaled_round(blocks, scale, how.fmt, how.rounding)
        return found.to(how.dtype) if cast else found
    found = straight_round(blocks, scale, zero, shift, how.fmt, how.rounding, how.dtype)
    return found


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, blocks: Tensor, scale: Tensor, zero: Tensor | None, shift: Tensor | None, how: How) -> Tensor:
        ctx.save_for_backward(blocks, scale, zero, shift)
        ctx.how = how
        return _forward(blocks, scale, zero, shift, how)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        blocks, scale, zero, shift = ctx.saved_tensors
        for_blocks, for_scale, _, for_shift, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # a second derivative is asked for
            return _differentiable(gradient, blocks, scale, zero, shift, ctx.how, ctx.needs_input_grad)
        to_blocks, to_scale, to_shift = straight_round_backward(
            gradient, blocks, scale, zero, shift, ctx.how.fmt, ctx.how.rounding, ctx.how.far, for_blocks, for_scale,
            ctx.how.share,
        )  # fmt: skip
        return (
            to_blocks if for_blocks else None, to_scale if for_scale else None, None, to_shift if for_shift else None,
            None,
        )  # fmt: skip


def _differentiable(
    gradient: Tensor, blocks: Tensor, scale: Tensor, zero: Tensor | None, shift: Tensor | None, how: How, asked: Any
) -> tuple[Tensor | None, ...]:
    """The gradients as sums and products of which there are gradients again."""
    by = safe_divisor(scale)
    y = blocks.float() / by
    distance = 1.0 if shift is None else gap(y.detach(), how.fmt)
    moved = y if shift is None else y + shift * distance
    low, high = ends(how.fmt, zero, how.far)
    inside = (moved >= low) & (moved <= high)
    wide = gradient.float()
    passed = torch.where(inside, wide * scale, 0.0)
    # Values follow y where it passes, as the first derivative has it.
    values = _values(moved.detach().contiguous(), zero, how.fmt, how.rounding)
    values = values + torch.where(inside, moved - moved.detach(), 0.0)
    to_scale = (wide * values).sum(1, keepdim=True)
    to_scale = to_scale + torch.where(scale == 0, 0.0, (-passed * (y / by)).sum(1, keepdim=True))
    return (
        (passed / by).to(blocks.dtype) if asked[0] else None, to_scale * how.share if asked[1] else None, None,
        passed * distance if asked[3] else None, None,
    )  # fmt: skip
