"""CPU versions: the same numbers, in chunks that stay in the cache, two ways.

*Arithmetic on bit patterns* (minifloats, ties to even). For y with exponent E, adding c = 1.5 * 2^(E + 23 - m) moves
the rounding position of the float32 adder to the format's last mantissa bit, and subtracting c leaves y rounded, ties
to even. 2^E comes from masking y's exponent bits, held between the exponents of the format's subnormals and of its
largest value; c has a mantissa of 1.5 so that the sum stays in c's binade for either sign. Symmetric integers round
directly.

*Table look-up* (everything else up to 8 bits). The upper 16 bits of a float32 choose one of 65,536 cells; a cell with
at most one threshold needs one comparison: ``y >= threshold[cell] ? upper[cell] : lower[cell]``.

Chunks are below torch's own grain size, so each op in them runs on the thread that calls it, and a small pool of
threads shares the chunks. A step costs about as much to call as to run, so steps are few and write into buffers that
each thread keeps.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
OWN_MAPPING = 32 << 20  # bytes from which malloc gives a tensor pages of its own, so that advice meets no neighbour
_CPU = torch.device("cpu")
_own = threading.local()  # each thread's buffers


@dataclass(frozen=True)
class _Buffers:
    """A thread's memory for one chunk: ``y`` holds the input of a rounder, all else may be overwritten; bits are views."""

    y: Tensor
    a: Tensor
    b: Tensor
    y_bits: np.ndarray
    a_bits: np.ndarray
    b_bits: np.ndarray

    @staticmethod
    def of(memory: Tensor) -> _Buffers:
        """Three float32 tensors in ``memory`` [3, ...]."""
        y, a, b = memory
        return _Buffers(y, a, b, *(t.numpy().view(np.int32) for t in (y, a, b)))


Rounder = Callable[[_Buffers], Tensor]
"""Rounds ``y`` onto a grid, into one of the buffers."""


def round_to(x: Tensor, fmt: str, rounding: str) -> Tensor:
    """See :func:`nybble.ops.rounding.round_to`."""
    rounder = _rounder(fmt, rounding)
    if rounder is None or x.numel() == 0:
        return _reference(rounding_ops.round_to)(x, fmt, rounding)
    flat = x.contiguous().view(-1)
    out = _empty(flat.shape, flat.dtype)

    def work(start: int, stop: int) -> None:
        chunk = _buffers(stop - start, 1)
        chunk.y.copy_(flat[start:stop].view(-1, 1))
        out[start:stop] = rounder(chunk).view(-1)

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
    out = _empty(flat.shape, torch.float32)

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
    out = _empty(blocks.shape, blocks.dtype)

    def part(x: Tensor, by: Tensor, scale: Tensor, to: Tensor) -> None:
        chunk = _buffers(*x.shape)
        (torch.mul if reciprocal else torch.div)(x.float(), by, out=chunk.y)
        _times(rounder(chunk), scale, to)

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
    out = _empty(blocks.shape, blocks.dtype)
    plain = not pow2 and scale_dtype == "float32"

    def work(start: int, stop: int) -> None:
        x = blocks[start:stop].float()
        chunk = _buffers(stop - start, columns)
        # The bits of magnitudes are ordered as integers, NaN on top: an integer maximum is a third of the work.
        amax = torch.abs(x, out=chunk.y).view(torch.int32).amax(1, keepdim=True).view(torch.float32)
        if plain:  # block_scale in two steps
            scale = torch.threshold_(amax.div_(target), 0.0, 1.0)
        else:
            scale = block_ops.block_scale(amax, fmt, target, pow2, scale_dtype)
        torch.div(x, scale, out=chunk.y)
        _times(rounder(chunk), scale, out[start:stop])

    _share(work, count, max(1, CHUNK // columns))
    return out


def _empty(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Memory for a result; a large one in huge pages where Linux has them: to touch small ones costs as much as the sums."""
    out = torch.empty(shape, dtype=dtype)
    advise = _madvise()
    if advise is not None and out.nbytes >= OWN_MAPPING:
        start = -(-out.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        advise(start, out.data_ptr() + out.nbytes - start, mmap.MADV_HUGEPAGE)  # advice: refused, it changes nothing
    return out


@lru_cache(maxsize=1)
def _madvise() -> Callable[[int, int, int], int] | None:
    """madvise(2), or None where there are no huge pages to ask for."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    found: Callable[[int, int, int], int] = advise
    return found


def _times(rounded: Tensor, scale: Tensor, out: Tensor) -> None:
    if out.dtype == torch.float32:
        torch.mul(rounded, scale, out=out)
    else:
        out.copy_(rounded.mul_(scale))


def _reference(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The op's readable version, which a registered kernel would otherwise hide."""
    reference: Callable[..., Tensor] = op._init_fn  # type: ignore[attr-defined]
    return reference


def _buffers(rows: int, columns: int) -> _Buffers:
    """This thread's buffers of shape [rows, columns]; the next call gives the same memory."""
    shape = (3, rows, columns)
    if rows * columns > CHUNK:
        return _Buffers.of(torch.empty(shape))
    if getattr(_own, "shape", None) != shape:
        if not hasattr(_own, "memory"):
            _own.memory = torch.empty(3, CHUNK)
        _own.shape, _own.chunk = shape, _Buffers.of(_own.memory[:, : rows * columns].view(shape))
    chunk: _Buffers = _own.chunk
    return chunk


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
        return lambda chunk: chunk.y.round_().clamp_(fmt.low, fmt.high).add_(0.0)  # the sum turns -0 into 0
    cells = _cells(fmt_name, rounding)
    if cells is None:
        return None
    thresholds, lower, upper, _, _ = cells

    def look_up(chunk: _Buffers) -> Tensor:
        y, a, b = (t.view(-1) for t in (chunk.y, chunk.a, chunk.b))
        cell = _cell(y)
        high = y >= torch.index_select(thresholds, 0, cell, out=a)
        torch.index_select(upper, 0, cell, out=a)
        torch.index_select(lower, 0, cell, out=b)
        torch.where(high, a, b, out=y)
        return chunk.y

    return look_up


def _adder_rounds(fmt: Minifloat) -> bool:
    """Whether the float32 adder can do it: c stays finite and normal; with m = 0 its even is not the even code."""
    inside = fmt.emax + 24 - fmt.m <= 127 and fmt.emin >= -126
    return fmt.has_sign and fmt.specials != "fnuz" and fmt.m >= 1 and inside


def _minifloat_rounder(fmt: Minifloat) -> Rounder:
    least, most, largest = 2.0**fmt.emin, 2.0**fmt.emax, fmt.max
    factor = 1.5 * 2.0 ** (23 - fmt.m)  # c = factor * 2^E is exact
    exponent, sign = np.int32(0x7F800000), np.int32(-(1 << 31))

    def rounder(chunk: _Buffers) -> Tensor:
        y, power, rounded = chunk.y, chunk.a, chunk.b
        np.bitwise_and(chunk.y_bits, exponent, out=chunk.a_bits)  # numpy's is the quicker one on bits
        power.clamp_(least, most)
        torch.add(y, power, alpha=factor, out=rounded)
        rounded.sub_(power, alpha=factor).clamp_(-largest, largest)
        np.bitwise_and(chunk.y_bits, sign, out=chunk.a_bits)  # a negative number may have become +0
        np.bitwise_or(chunk.b_bits, chunk.a_bits, out=chunk.b_bits)
        return rounded

    return rounder


def _cell(y: Tensor) -> Tensor:
    """Upper 16 bits of each float32 as an index 0 .. 65535; negative numbers come first."""
    return y.view(torch.int32).bitwise_right_shift(16).add_(32768)


@lru_cache(maxsize=256)
def _cells(fmt_name: str, rounding: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """Per cell: its threshold (NaN if none), lower and upper value, lower and upper code; None if a cell has two."""
    fmt: NumberFormat = get_format(fmt_name)
    if fmt.bits > 8:
        return None
    thresholds = fmt.thresholds(rounding)
    cells = np.arange(-32768, 32768, dtype=np.int32) << 16
    ends = np.stack([cells, cells | 0xFFFF]).view(np.float32)
    ranks = np.searchsorted(thresholds, ends, side="right")
    low, high = ranks.min(0), ranks.max(0)
    # The two cells that start with +-Inf go on with NaNs, whose rank is the last: "at least +-Inf" tells the one from
    # the others.
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
