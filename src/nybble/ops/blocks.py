"""Fake quantization of ``[blocks, elements]``: divide by the block's scale, round, multiply back.

``x_hat = scale * round_to(x / scale)``, float32 inside. A scale of zero divides as 1, so its block comes out zero, not NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.formats import get_format
from nybble.ops.rounding import round_to
from nybble.ops.scaling import absmax_scale, pow2_scale


def safe_divisor(scale: Tensor) -> Tensor:
    """``scale`` with its zeros replaced by one."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def divide(x: Tensor, scale: Tensor, reciprocal: bool) -> Tensor:
    """``x / scale``, or ``x * (1 / scale)`` as some peers calculate it; both float32."""
    return x * (1.0 / safe_divisor(scale)) if reciprocal else x / safe_divisor(scale)


@torch.library.custom_op("nybble::scaled_round", mutates_args=())
def scaled_round(blocks: Tensor, scale: Tensor, fmt: str, rounding: str, reciprocal: bool = False) -> Tensor:
    """Fake-quantize with given scales.

    Args:
        blocks: float32, float16 or bfloat16, [blocks, elements].
        scale: float32, [blocks, 1] or [blocks, elements].
        fmt: name of the format.
        rounding: name of a deterministic rounding.
        reciprocal: multiply by the reciprocal instead of dividing.

    Returns:
        shape and dtype of ``blocks``.
    """
    return (round_to(divide(blocks.float(), scale, reciprocal), fmt, rounding) * scale).to(blocks.dtype)


@scaled_round.register_fake
def _(blocks: Tensor, scale: Tensor, fmt: str, rounding: str, reciprocal: bool = False) -> Tensor:
    return torch.empty_like(blocks)


@torch.library.custom_op("nybble::dynamic_round", mutates_args=())
def dynamic_round(blocks: Tensor, fmt: str, rounding: str, target: float, pow2: str, scale_dtype: str) -> Tensor:
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
    wide = blocks.float()
    scale = block_scale(wide.abs().amax(1, keepdim=True), fmt, target, pow2, scale_dtype)
    return (round_to(wide / scale, fmt, rounding) * scale).to(blocks.dtype)


@dynamic_round.register_fake
def _(blocks: Tensor, fmt: str, rounding: str, target: float, pow2: str, scale_dtype: str) -> Tensor:
    return torch.empty_like(blocks)


def block_scale(amax: Tensor, fmt: str, target: float, pow2: str, scale_dtype: str) -> Tensor:
    """Scale of each block from its largest magnitude, as :func:`dynamic_round` uses it; float32, shape of ``amax``."""
    if pow2:
        return pow2_scale(amax, get_format(fmt), pow2)
    return narrow_scale(absmax_scale(amax, target), scale_dtype)


def narrow_scale(scale: Tensor, dtype: str) -> Tensor:
    """``scale`` rounded to a 16-bit ``dtype`` and back to float32; one that would become 0 becomes the smallest that does not."""
    if dtype == "float32":
        return scale
    kind: torch.dtype = getattr(torch, dtype)
    narrow = scale.to(kind)
    least = torch.tensor(1, dtype=torch.int16).view(kind).to(scale.device)
    return torch.where((narrow == 0) & (scale > 0), least, narrow).float()
