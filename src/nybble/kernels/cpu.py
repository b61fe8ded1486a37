"""CPU versions: the same numbers, in chunks that stay in the cache (:mod:`nybble.kernels._chunks`).

Each step is one torch operator on a whole chunk and writes into buffers that stay; how a chunk is rounded is in
:mod:`nybble.kernels._rounders`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nybble.formats import get_format
from nybble.kernels._chunks import ALONE, buffers, cut, empty, parts
from nybble.kernels._rounders import adder, cell, cells, rounder
from nybble.ops import blocks as block_ops
from nybble.ops import rounding as rounding_ops
from nybble.ops.checks import check_blocks, check_dynamic, check_floats
from nybble.ops.rounding import decode_table

_CPU = torch.device("cpu")


def round_to(x: Tensor, fmt: str, rounding: str) -> Tensor:
    """See :func:`nybble.ops.rounding.round_to`."""
    check_floats("round_to", x)
    rounds = rounder(fmt, rounding)
    if rounds is None or x.numel() == 0:
        return _reference(rounding_ops.round_to)(x, fmt, rounding)
    flat = x.contiguous().view(-1)
    out = empty(flat.shape, flat.dtype)
    with torch.inference_mode():
        for start, stop in parts(flat.numel(), 1):
            chunk = buffers(stop - start, 1)
            chunk.y.copy_(flat[start:stop].view(-1, 1))
            out[start:stop] = rounds(chunk).view(-1)
    return out.view(x.shape)


def encode(x: Tensor, fmt: str, rounding: str) -> Tensor:
    """See :func:`nybble.ops.rounding.encode`."""
    found = cells(fmt, rounding) if x.dtype == torch.float32 else None
    if found is None or x.numel() == 0:
        return _reference(rounding_ops.encode)(x, fmt, rounding)
    thresholds, _, _, lower, upper = found
    flat = x.contiguous().view(-1)
    out = torch.empty(flat.shape, dtype=torch.uint8)
    with torch.inference_mode():
        for start, stop in parts(flat.numel(), 1):
            y = flat[start:stop]
            at = cell(y)
            high = y >= thresholds.index_select(0, at)
            torch.where(high, upper.index_select(0, at), lower.index_select(0, at), out=out[start:stop])
    return out.view(x.shape)


def decode(codes: Tensor, fmt: str) -> Tensor:
    """See :func:`nybble.ops.rounding.decode`."""
    table = decode_table(fmt, _CPU)
    flat = codes.contiguous().view(-1)
    out = empty(flat.shape, torch.float32)
    with torch.inference_mode():
        for start, stop in parts(flat.numel(), 1):
            torch.index_select(table, 0, flat[start:stop].int(), out=out[start:stop])
    return out.view(codes.shape)


def scaled_round(blocks: Tensor, scale: Tensor, fmt: str, rounding: str, reciprocal: bool = False) -> Tensor:
    """See :func:`nybble.ops.blocks.scaled_round`."""
    check_blocks("scaled_round", blocks, scale)
    rounds = rounder(fmt, rounding)
    if rounds is None or blocks.numel() == 0:
        return _reference(block_ops.scaled_round)(blocks, scale, fmt, rounding, reciprocal)
    divisor = block_ops.safe_reciprocal(scale) if reciprocal else block_ops.safe_divisor(scale)
    blocks = blocks.contiguous()
    out = empty(blocks.shape, blocks.dtype)
    with torch.inference_mode():
        for x, by, s, to in cut(blocks, divisor, scale, out):
            chunk = buffers(*x.shape)
            (torch.mul if reciprocal else torch.div)(x.float(), by, out=chunk.y)
            _multiply(rounds(chunk), s, to)
    return out


def dynamic_round(blocks: Tensor, fmt: str, rounding: str, target: float, pow2: str, scale_dtype: str) -> Tensor:
    """See :func:`nybble.ops.blocks.dynamic_round`."""
    check_dynamic("dynamic_round", blocks, target, pow2, scale_dtype)
    rounds = rounder(fmt, rounding)
    if rounds is None or blocks.numel() == 0:
        return _reference(block_ops.dynamic_round)(blocks, fmt, rounding, target, pow2, scale_dtype)
    blocks = blocks.contiguous()
    count, columns = blocks.shape
    if columns > ALONE or not get_format(fmt).has_zero:  # without a zero a scale may be 0, which nothing divides by
        amax = blocks.abs().amax(1, keepdim=True).float()
        return scaled_round(blocks, block_ops.block_scale(amax, fmt, target, pow2, scale_dtype), fmt, rounding)
    out = empty(blocks.shape, blocks.dtype)
    plain = not pow2 and scale_dtype == "float32"
    vanishing = math.ldexp(math.floor(target / 2), -149)  # the largest float32 whose quotient rounds to 0
    adds = adder(fmt, rounding)
    with torch.inference_mode():
        for start, stop in parts(count, columns):
            x, to = blocks[start:stop], out[start:stop]
            x = x if x.dtype == torch.float32 else x.float()
            chunk = buffers(stop - start, columns)
            # The bits of magnitudes are ordered as integers, NaN on top: an integer maximum is a third of the work.
            amax = torch.abs(x, out=chunk.y).view(torch.int32).amax(1, keepdim=True).view(torch.float32)
            if plain:  # block_scale in two steps: what would divide to 0 becomes the target, and so 1
                scale = torch.threshold_(amax, vanishing, target).div_(target)
            else:
                scale = block_ops.block_scale(amax, fmt, target, pow2, scale_dtype)
            if adds is None:
                torch.div(x, scale, out=chunk.y)
                _multiply(rounds(chunk), scale, to)
                continue
            # Over a negated scale every zero comes back as -0, and adding 0 * x makes it +0 where x is positive: one
            # step instead of copying signs. (Infinity times 0 is NaN, as its block is anyhow.)
            torch.div(x, scale.neg_(), out=chunk.y)
            rounded = adds(chunk, chunk.y).mul_(scale)
            if to.dtype == torch.float32:
                torch.add(rounded, x, alpha=0, out=to)
            else:
                to.copy_(rounded.add_(x, alpha=0))
    return out


def _multiply(rounded: Tensor, scale: Tensor, out: Tensor) -> None:
    if out.dtype == torch.float32:
        torch.mul(rounded, scale, out=out)
    else:
        out.copy_(rounded.mul_(scale))


def _reference(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The op's readable version, which a registered kernel would otherwise hide."""
    reference: Callable[..., Tensor] = op._init_fn  # type: ignore[attr-defined]
    return reference


for _op, _fast in (
    (rounding_ops.round_to, round_to),
    (rounding_ops.encode, encode),
    (rounding_ops.decode, decode),
    (block_ops.scaled_round, scaled_round),
    (block_ops.dynamic_round, dynamic_round),
):
    _op.register_kernel("cpu")(_fast)
