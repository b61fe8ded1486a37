"""Fake quantization of ``[blocks, elements]``: divide by the block's scale, round, multiply back.

``x_hat = scale * round_to(x / scale)``, float32 inside. A scale of zero divides as 1, so its block comes out zero, not
NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.core.shapes import Float, Float32
from nybble.formats import get_format
from nybble.ops.checks import check_blocks, check_dynamic
from nybble.ops.rounding import round_to
from nybble.ops.scaling import absmax_scale, pow2_scale


def safe_divisor(scale: Tensor) -> Tensor:
    """``scale`` with its zeros replaced by one."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def safe_reciprocal(scale: Tensor) -> Tensor:
    """``1 / scale`` with zeros as one; finite also below 2^-128, since infinity times a zero would be NaN."""
    largest = torch.finfo(torch.float32).max
    return (1.0 / safe_divisor(scale)).clamp(-largest, largest)


def divide(x: Tensor, scale: Tensor, reciprocal: bool) -> Tensor:
    """``x / scale``, or ``x * (1 / scale)`` as some peers calculate it; both float32."""
    return x * safe_reciprocal(scale) if reciprocal else x / safe_divisor(scale)


@torch.library.custom_op(
    "nybble::scaled_round",
    mutates_args=(),
    schema="(Tensor blocks, Tensor scale, str fmt, str rounding, bool reciprocal=False) -> Tensor",
)
def scaled_round(
    blocks: Float[Tensor, "blocks elements"],
    scale: Float32[Tensor, "#blocks #elements"],
    fmt: str,
    rounding: str,
    reciprocal: bool = False,
) -> Float[Tensor, "blocks elements"]:
    """Fake-quantize with given scales.

    Args:
        blocks: float32, float16 or bfloat16, [blocks, elements].
        scale: float32, [blocks, 1], [1, elements] or [blocks, elements].
        fmt: name of the format.
        rounding: name of a deterministic rounding.
        reciprocal: multiply by the reciprocal instead of dividing.

    Returns:
        shape and dtype of ``blocks``.
    """
    check_blocks("scaled_round", blocks, scale)
    wide = blocks.float().contiguous()
    rounded: Tensor = round_to(divide(wide, scale, reciprocal), fmt, rounding)
    return (rounded * scale).to(blocks.dtype)


@scaled_round.register_fake
def _(blocks: Tensor, scale: Tensor, fmt: str, rounding: str, reciprocal: bool = False) -> Tensor:
    check_blocks("scaled_round", blocks, scale)
    return blocks.new_empty(blocks.shape)


@torch.library.custom_op(
    "nybble::dynamic_round",
    mutates_args=(),
    schema="(Tensor blocks, str fmt, str rounding, float target, str pow2, str scale_dtype) -> Tensor",
)
def dynamic_round(
    blocks: Float[Tensor, "blocks elements"], fmt: str, rounding: str, target: float, pow2: str, scale_dtype: str
) -> Float[Tensor, "blocks elements"]:
    """Fake-quantize with each block's own scale from its largest magnitude.

    Args:
        blocks: float32, float16 or bfloat16, [blocks, elements].
        fmt: name of the format.
        rounding: name of a deterministic rounding.
        target: value that the largest magnitude is mapped to (unused with ``pow2``).
        pow2: a mode of :func:`~nybble.ops.scaling.pow2_scale`, or empty for ``amax / target``.
        scale_dtype: float32, float16 or bfloat16: what the scale is rounded to before use.

    Returns:
        shape and dtype of ``blocks``.
    """
    check_dynamic("dynamic_round", blocks, target, pow2, scale_dtype)
    if not blocks.numel():
        return torch.empty_like(blocks)
    wide = blocks.float().contiguous()
    scale = block_scale(wide.abs().amax(1, keepdim=True), fmt, target, pow2, scale_dtype)
    rounded: Tensor = round_to(wide / safe_divisor(scale), fmt, rounding)
    return (rounded * scale).to(blocks.dtype)


@dynamic_round.register_fake
def _(blocks: Tensor, fmt: str, rounding: str, target: float, pow2: str, scale_dtype: str) -> Tensor:
    return blocks.new_empty(blocks.shape)


def block_scale(amax: Tensor, fmt: str, target: float, pow2: str, scale_dtype: str) -> Tensor:
    """Scale of each block from its largest magnitude, as :func:`dynamic_round` uses it; float32, shape of ``amax``."""
    form = get_format(fmt)
    scale = pow2_scale(amax, form, pow2) if pow2 else absmax_scale(amax, form, target)
    return narrow_scale(scale, scale_dtype)


def narrow_scale(scale: Float32[Tensor, "*shape"], dtype: str) -> Float32[Tensor, "*shape"]:
    """``scale`` rounded to a 16-bit ``dtype`` and back to float32; what is neither 0 nor infinite stays so."""
    if dtype == "float32":
        return scale
    found: Tensor = narrowed(scale, dtype)
    return found


@torch.library.custom_op("nybble::narrowed", mutates_args=(), schema="(Tensor scale, str dtype) -> Tensor")
def narrowed(scale: Float32[Tensor, "*shape"], dtype: str) -> Float32[Tensor, "*shape"]:
    """:func:`narrow_scale` to one of the 16-bit dtypes.

    Args:
        scale: float32, any shape.
        dtype: float16 or bfloat16.

    Returns:
        float32, shape of ``scale``.
    """
    scale = scale.contiguous()
    kind: torch.dtype = getattr(torch, dtype)
    info = torch.finfo(kind)
    magnitude = scale.abs()
    held = magnitude.clamp(info.smallest_normal * info.eps, info.max)
    kept = (magnitude == 0) | (magnitude == torch.inf)
    return torch.copysign(torch.where(kept, magnitude, held), scale).to(kind).float()


@narrowed.register_fake
def _(scale: Tensor, dtype: str) -> Tensor:
    return scale.new_empty(scale.shape)
