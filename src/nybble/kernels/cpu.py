"""CPU versions: the same numbers, in chunks that stay in the cache, two ways.

*Arithmetic on bit patterns* (minifloats and symmetric integers, ties to even). For |y| with exponent E, adding c = 1.5 * 2^(E + 23 - m)
moves the rounding position of the float32 adder to the format's last mantissa bit, and subtracting c leaves the value
rounded, ties to even. E comes from masking |y|'s exponent bits, raised to the subnormals' exponent; c has a mantissa of 1.5 so
that the sum stays in c's binade.

*Table look-up* (everything else up to 8 bits). The upper 16 bits of a float32 choose one of 65,536 cells; a cell with at most
one threshold needs one comparison: ``y >= threshold[cell] ? upper[cell] : lower[cell]``.

Chunks are below torch's own grain size, so each op in them runs on the thread that calls it, and a small pool of threads
shares the chunks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from nybble.formats import NumberFormat, get_format
from nybble.formats.integer import IntFormat
from nybble.formats.minifloat import Minifloat
from nybble.ops import blocks as block_ops
from nybble.ops import rounding as rounding_ops
from nybble.ops.rounding import decode_table

CHUNK = 32_256  # elements: below torch's grain size of 32,768, and a multiple of the usual group sizes
_CPU = torch.device("cpu")


def round_to(x: Tensor, fmt: str, rounding: str) -> Tensor:
    """See :func:`nybble.ops.rounding.round_to`."""
    step = _rounder(fmt, rounding)
    if step is None or x.numel() == 0:
        return _reference(rounding_ops.round_to)(x, fmt, rounding)
    flat = x.contiguous().view(-1)
    out = torch.empty_like(flat)

    def work(start: int, stop: int) -> None:
        out[start:stop] = step(flat[start:stop].clone())

    _share(work, flat.numel(), CHUNK)
    return out.view(x.shape)


def encode(x: Tensor, fmt: str, rounding: str) -> Tensor:
    """See :func:`nybble.ops.rounding.encode`."""
    cells = _cells(fmt, rounding)
    if cells is None or x.numel() == 0:
        return _reference(rounding_ops.encode)(x, fmt, rounding)
    thresholds, _, _, lower, upper = cells
    flat = x.contiguous().view(-1)
    out = torch.empty(flat.shape, dtype=torch.uint8)

    def work(start: int, stop: int) -> None:
        y = flat[start:stop]
        cell = _cell(y)
        high = y >= thresholds.index_select(0, cell)
        torch.where(high, upper.index_select(0, cell), lower.index_select(0, cell), out=out[start:stop])

    _share(work, flat.numel(), CHUNK)
    return out.view(x.shape)


def decode(codes: Tensor, fmt: str) -> Tensor:
    """See :func:`nybble.ops.rounding.decode`."""
    table = decode_table(fmt, _CPU)
    flat = codes.contiguous().view(-1)
    out = torch.empty(flat.shape, dtype=torch.float32)

    def work(start: int, stop: int) -> None:
        torch.index_select(table, 0, flat[start:stop].int(), out=out[start:stop])

    _share(work, flat.numel(), CHUNK)
    return out.view(codes.shape)


def scaled_round(blocks: Tensor, scale: Tensor, fmt: str, rounding: str, reciprocal: bool = False) -> Tensor:
    """See :func:`nybble.ops.blocks.scaled_round`."""
    step = _rounder(fmt, rounding)
    if step is None or blocks.numel() == 0:
        return _reference(block_ops.scaled_round)(blocks, scale, fmt, rounding, reciprocal)
    divisor = block_ops.safe_divisor(scale)
    divisor = 1.0 / divisor if reciprocal else divisor
    blocks = blocks.contiguous()
    out = torch.empty_like(blocks)

    def work(start: int, stop: int) -> None:
        part, by = blocks[start:stop], divisor[start:stop]
        y = part.float() * by if reciprocal else part.float() / by
        out[start:stop] = step(y).mul_(scale[start:stop])

    _share_blocks(work, blocks)
    return out


def dynamic_round(blocks: Tensor, fmt: str, rounding: str, target: float, pow2: str, scale_dtype: str) -> Tensor:
    """See :func:`nybble.ops.blocks.dynamic_round`."""
    step = _rounder(fmt, rounding)
    if step is None or blocks.numel() == 0:
        return _reference(block_ops.dynamic_round)(blocks, fmt, rounding, target, pow2, scale_dtype)
    blocks = blocks.contiguous()
    out = torch.empty_like(blocks)

    scratch = threading.local()
    rows = min(blocks.shape[0], max(1, CHUNK // blocks.shape[1]))

    def work(start: int, stop: int) -> None:
        if not hasattr(scratch, "y"):  # one buffer a thread: fresh memory for every chunk would cost more than the sums
            scratch.y = torch.empty(rows, blocks.shape[1])
        part, y = blocks[start:stop], scratch.y[: stop - start]
        if part.dtype != torch.float32:
            part = part.float()
        torch.abs(part, out=y)
        scale = block_ops.block_scale(y.amax(1, keepdim=True), fmt, target, pow2, scale_dtype)
        torch.div(part, scale, out=y)
        out[start:stop] = step(y).mul_(scale)

    _share_blocks(work, blocks)
    return out


def _reference(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The op's readable version, which a registered kernel would otherwise hide."""
    reference: Callable[..., Tensor] = op._init_fn  # type: ignore[attr-defined]
    return reference


def _share_blocks(work: Callable[[int, int], None], blocks: Tensor) -> None:
    _share(work, blocks.shape[0], max(1, CHUNK // blocks.shape[1]))


def _share(work: Callable[[int, int], None], count: int, step: int) -> None:
    """Call ``work(start, stop)`` over ``range(count)`` in steps, on as many threads as torch uses."""
    threads = torch.get_num_threads()
    if threads == 1 or count <= 4 * step:
        for start in range(0, count, step):
            work(start, min(start + step, count))
        return

    def run(starts: Iterator[int]) -> None:
        for start in starts:
            work(start, min(start + step, count))

    shares = [iter(range(worker * step, count, threads * step)) for worker in range(threads)]
    list(_pool(threads).map(run, shares))


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="nybble")


@lru_cache(maxsize=256)
def _rounder(fmt_name: str, rounding: str) -> Callable[[Tensor], Tensor] | None:
    """A function that rounds a float32 chunk onto the grid (it may overwrite it), or None."""
    fmt = get_format(fmt_name)
    if rounding == "nearest-even" and isinstance(fmt, Minifloat) and _adder_rounds(fmt):
        return _minifloat_rounder(fmt)
    if rounding == "nearest-even" and isinstance(fmt, IntFormat):
        return lambda y: y.round_().clamp_(fmt.low, fmt.high).add_(0.0)
    cells = _cells(fmt_name, rounding)
    if cells is None:
        return None
    thresholds, lower, upper, _, _ = cells

    def look_up(y: Tensor) -> Tensor:
        flat = y.view(-1)
        cell = _cell(flat)
        high = flat >= thresholds.index_select(0, cell)
        return torch.where(high, upper.index_select(0, cell), lower.index_select(0, cell)).view(y.shape)

    return look_up


def _adder_rounds(fmt: Minifloat) -> bool:
    """Whether the float32 adder can do it: the helper must stay finite, and with m = 0 its even is not the even code."""
    return fmt.has_sign and fmt.specials != "fnuz" and fmt.m >= 1 and fmt.emax + 24 - fmt.m <= 127


def _minifloat_rounder(fmt: Minifloat) -> Callable[[Tensor], Tensor]:
    least = (fmt.emin + 127) << 23
    shift = ((23 - fmt.m) << 23) | 0x400000
    largest = fmt.max

    scratch = threading.local()

    def rounder(y: Tensor) -> Tensor:
        if getattr(scratch, "shape", None) != y.shape:
            scratch.shape = y.shape
            scratch.magnitude, scratch.helper = torch.empty_like(y), torch.empty_like(y)
        magnitude, helper = scratch.magnitude, scratch.helper
        torch.abs(y, out=magnitude)
        magnitude.clamp_(max=largest)
        bits = helper.view(torch.int32)
        torch.bitwise_and(magnitude.view(torch.int32), 0x7F800000, out=bits)
        bits.clamp_(min=least).add_(shift)
        magnitude.add_(helper).sub_(helper)
        return torch.copysign(magnitude, y, out=y)

    return rounder


def _cell(y: Tensor) -> Tensor:
    """Upper 16 bits of each float32 as an index 0 .. 65535; negative numbers come first."""
    return y.view(torch.int32).bitwise_right_shift(16).add_(32768)


@lru_cache(maxsize=256)
def _cells(fmt_name: str, rounding: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """Per cell: the threshold in it (NaN if none), lower and upper value, lower and upper code; None if a cell has two."""
    fmt: NumberFormat = get_format(fmt_name)
    if fmt.bits > 8:
        return None
    thresholds = fmt.thresholds(rounding)
    cells = np.arange(-32768, 32768, dtype=np.int32) << 16
    ends = np.stack([cells, cells | 0xFFFF]).view(np.float32)
    ranks = np.searchsorted(thresholds, ends, side="right")
    low, high = ranks.min(0), ranks.max(0)
    # The two cells that start with +-Inf go on with NaNs: there "at least +-Inf" tells the one from the others.
    infinite = np.isinf(ends[0])
    is_nan = np.isnan(ends).all(0) | infinite
    low, high = np.where(infinite, ranks[0], low), np.where(infinite, ranks[0], high)
    if (high - low)[~is_nan].max() > 1:
        return None
    value, code = fmt.grid.astype(np.float32), fmt.grid_codes.astype(np.uint8)

    def of(rank: np.ndarray, is_nan: np.ndarray) -> tuple[Tensor, Tensor]:
        values, codes = value[rank], code[rank]
        if fmt.negative_zero is not None:
            minus = (values == 0) & (cells < 0)
            values, codes = (
                np.where(minus, np.float32(-0.0), values),
                np.where(minus, np.uint8(fmt.negative_zero), codes),
            )
        values = np.where(is_nan, np.float32(np.nan), values)
        codes = np.where(is_nan & (fmt.nan_code is not None), np.uint8(fmt.nan_code or 0), codes)
        return torch.from_numpy(values), torch.from_numpy(codes)

    (low_value, low_code), (high_value, high_code) = of(low, is_nan), of(high, is_nan & ~infinite)
    inside = thresholds[np.minimum(low, len(thresholds) - 1)]
    inside = np.where(infinite, ends[0], np.where((high > low) & ~is_nan, inside, np.float32(np.nan)))
    return torch.from_numpy(inside), low_value, high_value, low_code, high_code


for _op, _fast in (
    (rounding_ops.round_to, round_to),
    (rounding_ops.encode, encode),
    (rounding_ops.decode, decode),
    (block_ops.scaled_round, scaled_round),
    (block_ops.dynamic_round, dynamic_round),
):
    _op.register_kernel("cpu")(_fast)
