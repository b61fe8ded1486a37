"""CPU versions: the same numbers, in chunks that stay in the cache, two ways.

*Arithmetic on bit patterns* (minifloats, ties to even). For y with exponent E, adding c = 1.5 * 2^(E + 23 - m) moves the rounding
position of the float32 adder to the format's last mantissa bit, and subtracting c leaves y rounded, ties to even.
2^E comes from masking y's exponent bits, held between the exponents of the format's subnormals and of its
largest value; c has a mantissa of 1.5 so that the sum stays in c's binade for either sign. Symmetric integers round directly.

*Table look-up* (everything else up to 8 bits). The upper 16 bits of a float32 choose one of 65,536 cells; a cell with at most
one threshold needs one comparison: ``y >= threshold[cell] ? upper[cell] : lower[cell]``.

Chunks are below torch's own grain size, so each op in them runs on the thread that calls it, and a small pool of threads
shares the chunks. A step costs about as much to call as to run, so steps are few and write into buffers that each thread keeps.
"""

from __future__ import annotations

import os
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
_own = threading.local()  # each thread's buffers

Rounder = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(y, a, b) -> rounded``: y a float32 chunk, a and b buffers of its shape; all three may be overwritten."""


def round_to(x: Tensor, fmt: str, rounding: str) -> Tensor:
    """See :func:`nybble.ops.rounding.round_to`."""
    rounder = _rounder(fmt, rounding)
    if rounder is None or x.numel() == 0:
        return _reference(rounding_ops.round_to)(x, fmt, rounding)
    flat = x.contiguous().view(-1)
    out = torch.empty_like(flat)

    def work(start: int, stop: int) -> None:
        y, a, b = _buffers(stop - start, 1)
        out[start:stop] = rounder(y.copy_(flat[start:stop].view(-1, 1)), a, b).view(-1)

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
    rounder = _rounder(fmt, rounding)
    if rounder is None or blocks.numel() == 0:
        return _reference(block_ops.scaled_round)(blocks, scale, fmt, rounding, reciprocal)
    divisor = block_ops.safe_reciprocal(scale) if reciprocal else block_ops.safe_divisor(scale)
    blocks = blocks.contiguous()
    out = torch.empty_like(blocks)

    def part(x: Tensor, by: Tensor, scale: Tensor, to: Tensor) -> None:
        y, a, b = _buffers(*x.shape)
        (torch.mul if reciprocal else torch.div)(x.float(), by, out=y)
        _times(rounder(y, a, b), scale, to)

    count, columns = blocks.shape
    if columns > CHUNK and scale.shape[1] == 1:  # few and long: cut within a block
        for row in range(count):
            x, by, s, to = (t[row : row + 1] for t in (blocks, divisor, scale, out))

            def work(start: int, stop: int, x: Tensor = x, by: Tensor = by, s: Tensor = s, to: Tensor = to) -> None:
                part(x[:, start:stop], by, s, to[:, start:stop])

            _share(work, columns, CHUNK)
        return out

    def work_rows(start: int, stop: int) -> None:
        part(blocks[start:stop], divisor[start:stop], scale[start:stop], out[start:stop])

    _share(work_rows, count, max(1, CHUNK // columns))
    return out


def dynamic_round(blocks: Tensor, fmt: str, rounding: str, target: float, pow2: str, scale_dtype: str) -> Tensor:
    """See :func:`nybble.ops.blocks.dynamic_round`."""
    rounder = _rounder(fmt, rounding)
    if rounder is None or blocks.numel() == 0:
        return _reference(block_ops.dynamic_round)(blocks, fmt, rounding, target, pow2, scale_dtype)
    blocks = blocks.contiguous()
    count, columns = blocks.shape
    if columns > CHUNK:
        amax = blocks.abs().amax(1, keepdim=True).float()
        return scaled_round(blocks, block_ops.block_scale(amax, fmt, target, pow2, scale_dtype), fmt, rounding)
    out = torch.empty_like(blocks)
    plain = not pow2 and scale_dtype == "float32"

    def work(start: int, stop: int) -> None:
        x = blocks[start:stop].float()
        y, a, b = _buffers(stop - start, columns)
        # The bits of magnitudes are ordered as integers, NaN on top: an integer maximum is a third of the work.
        amax = torch.abs(x, out=y).view(torch.int32).amax(1, keepdim=True).view(torch.float32)
        if plain:  # block_scale in two steps
            scale = torch.nn.functional.threshold_(amax.div_(target), 0.0, 1.0)
        else:
            scale = block_ops.block_scale(amax, fmt, target, pow2, scale_dtype)
        _times(rounder(torch.div(x, scale, out=y), a, b), scale, out[start:stop])

    _share(work, count, max(1, CHUNK // columns))
    return out


def _times(rounded: Tensor, scale: Tensor, out: Tensor) -> None:
    if out.dtype == torch.float32:
        torch.mul(rounded, scale, out=out)
    else:
        out.copy_(rounded.mul_(scale))


def _reference(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The op's readable version, which a registered kernel would otherwise hide."""
    reference: Callable[..., Tensor] = op._init_fn  # type: ignore[attr-defined]
    return reference


def _buffers(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Three float32 [rows, columns] of this thread; the next call gives the same memory."""
    shape = (rows, columns)
    if rows * columns > CHUNK:
        return torch.empty(shape), torch.empty(shape), torch.empty(shape)
    if getattr(_own, "shape", None) != shape:
        if not hasattr(_own, "memory"):
            _own.memory = torch.empty(3, CHUNK)
        _own.shape, _own.views = shape, tuple(m[: rows * columns].view(shape) for m in _own.memory)
    views: tuple[Tensor, Tensor, Tensor] = _own.views
    return views


def _share(work: Callable[[int, int], None], count: int, step: int) -> None:
    """Call ``work(start, stop)`` over ``range(count)`` in steps, on as many threads as torch uses."""

    # Inference mode skips the bookkeeping of gradients (the tensors are below autograd here), and lets a
    # thread that isn't in it write to tensors that were made in it.
    def run(starts: Iterator[int]) -> None:
        with torch.inference_mode():
            for start in starts:
                work(start, min(start + step, count))

    threads = torch.get_num_threads()
    if threads == 1 or count <= 4 * step:
        run(iter(range(0, count, step)))
    else:
        list(_pool(threads).map(run, [iter(range(first * step, count, threads * step)) for first in range(threads)]))


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="nybble")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


@lru_cache(maxsize=256)
def _rounder(fmt_name: str, rounding: str) -> Rounder | None:
    """A function that rounds a chunk onto the grid, or None."""
    fmt = get_format(fmt_name)
    if rounding == "nearest-even" and isinstance(fmt, Minifloat) and _adder_rounds(fmt):
        return _minifloat_rounder(fmt)
    if rounding == "nearest-even" and isinstance(fmt, IntFormat):
        return lambda y, a, b: y.round_().clamp_(fmt.low, fmt.high).add_(0.0)  # the sum turns -0 into 0
    cells = _cells(fmt_name, rounding)
    if cells is None:
        return None
    thresholds, lower, upper, _, _ = cells

    def look_up(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        flat = y.view(-1)
        cell = _cell(flat)
        high = flat >= torch.index_select(thresholds, 0, cell, out=a.view(-1))
        torch.index_select(upper, 0, cell, out=a.view(-1))
        torch.index_select(lower, 0, cell, out=b.view(-1))
        return torch.where(high.view(y.shape), a, b, out=y)

    return look_up


def _adder_rounds(fmt: Minifloat) -> bool:
    """Whether the float32 adder can do it: c must stay finite and normal, and with m = 0 its even is not the even code."""
    inside = fmt.emax + 24 - fmt.m <= 127 and fmt.emin >= -126
    return fmt.has_sign and fmt.specials != "fnuz" and fmt.m >= 1 and inside


def _minifloat_rounder(fmt: Minifloat) -> Rounder:
    least, most, largest = 2.0**fmt.emin, 2.0**fmt.emax, fmt.max
    factor = 1.5 * 2.0 ** (23 - fmt.m)  # c = factor * 2^E is exact

    def rounder(y: Tensor, power: Tensor, rounded: Tensor) -> Tensor:
        torch.bitwise_and(y.view(torch.int32), 0x7F800000, out=power.view(torch.int32))
        power.clamp_(least, most)
        torch.add(y, power, alpha=factor, out=rounded)
        rounded.sub_(power, alpha=factor).clamp_(-largest, largest)
        return torch.copysign(rounded, y, out=rounded)  # a negative number may have become +0

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
    # The two cells that start with +-Inf go on with NaNs, whose rank is the last: "at least +-Inf" tells the one from the others.
    infinite = np.isinf(ends[0])
    is_nan = np.isnan(ends).all(0) | infinite
    low, high = np.where(infinite, len(thresholds), low), np.where(infinite, ranks[0], high)
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
