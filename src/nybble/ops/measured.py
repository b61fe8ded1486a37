"""Scales of ``[blocks, elements]`` from each block's largest magnitude, measured in one operation.

:func:`dynamic_scale` gives those that :func:`nybble.ops.blocks.dynamic_round` divides by, :func:`nested_scale` those of
formats whose scales are quantized themselves (NVFP4: E4M3 over one float32 for the tensor).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.core.shapes import Float, Float32
from nybble.formats import get_format
from nybble.ops.blocks import block_scale, safe_divisor
from nybble.ops.rounding import round_to
from nybble.ops.scaling import absmax_scale, divided


@torch.library.custom_op(
    "nybble::dynamic_scale",
    mutates_args=(),
    schema="(Tensor blocks, str fmt, float target, str pow2, str scale_dtype) -> Tensor",
)
def dynamic_scale(
    blocks: Float[Tensor, "blocks elements"], fmt: str, target: float, pow2: str, scale_dtype: str
) -> Float32[Tensor, "blocks 1"]:
    """Each block's scale; arguments as :func:`nybble.ops.blocks.dynamic_round` has them.

    Args:
        blocks: float32, float16 or bfloat16, [blocks, elements]; at least one element.
        fmt: name of the format of the elements.
        target: value that the largest magnitude is mapped to (unused with ``pow2``).
        pow2: a mode of :func:`~nybble.ops.scaling.pow2_scale`, or empty.
        scale_dtype: float32, float16 or bfloat16: what the scale is rounded to.

    Returns:
        float32 [blocks, 1].
    """
    return block_scale(_largest(blocks), fmt, target, pow2, scale_dtype)


@dynamic_scale.register_fake
def _(blocks: Tensor, fmt: str, target: float, pow2: str, scale_dtype: str) -> Tensor:
    return blocks.new_empty((blocks.shape[0], 1), dtype=torch.float32)


@torch.library.custom_op(
    "nybble::nested_scale",
    mutates_args=(),
    schema="(Tensor blocks, float target, str inner, float inner_target, float least) -> Tensor",
)
def nested_scale(
    blocks: Float[Tensor, "blocks elements"], target: float, inner: str, inner_target: float, least: float
) -> Float32[Tensor, "blocks 1"]:
    """Each block's scale, quantized to the format ``inner`` over one scale for all blocks.

    Args:
        blocks: float32, float16 or bfloat16, [blocks, elements]; at least one element.
        target: value that the largest magnitude of a block is mapped to.
        inner: name of the scales' format; it has a zero and a NaN.
        inner_target: value that the largest scale is mapped to.
        least: smallest value of ``inner`` that is used; 0 allows all.

    Returns:
        float32 [blocks, 1].
    """
    raw = divided(_largest(blocks), target)
    outer = absmax_scale(raw.amax(), get_format(inner), inner_target)
    y = raw / safe_divisor(outer)
    if least:
        y = torch.where(y.isnan(), y, y.clamp(min=least))
    rounded: Tensor = round_to(y, inner, "nearest-even")
    return rounded * outer


@nested_scale.register_fake
def _(blocks: Tensor, target: float, inner: str, inner_target: float, least: float) -> Tensor:
    return blocks.new_empty((blocks.shape[0], 1), dtype=torch.float32)


def _largest(blocks: Tensor) -> Tensor:
    return blocks.abs().amax(1, keepdim=True).float()
