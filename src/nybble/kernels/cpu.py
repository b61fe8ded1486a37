"""CPU versions: the same numbers, in chunks that stay in the cache, two ways.

*Arithmetic on bit patterns* (minifloats, ties to even). For y with exponent E, adding c = 1.5 * 2^(E + 23 - m) moves
the rounding position of the float32 adder to the format's last mantissa bit, and subtracting c leaves y rounded, ties
to even. 2^E comes from masking y's exponent bits, held between the exponents of the format's subnormals and of its
largest value; c has a mantissa of 1.5 so that the sum stays in c's binade for either sign. Symmetric integers round
directly.

*Table look-up* (everything else up to 8 bits). The upper 16 bits of a float32 choose one of 65,536 cells; a cell with
at most one threshold needs one comparison: ``y >= threshold[cell] ? upper[cell] : lower[cell]``.

Each step is one torch operator on a whole chunk and writes into buffers that stay.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import threading
import time
from collections.abc import Callable, Iterator
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

ALONE = 32_256  # elements: below torch's grain of 32,768, so the calling thread works alone
SHARED = 65_536  # elements a thread where all of torch's threads work, which wait for each other after every step
OWN_MAPPING = 32 << 20  # bytes from which malloc gives a tensor pages of its own, so that advice meets no neighbour
_CPU = torch.device("cpu")
_own = threading.local()  # the calling thread's buffers


@dataclass(frozen=True)
class _Buffers:
    """Memory for one chunk, float32: ``y`` holds the input of a rounder, all three may be overwritten."""

    y: Tensor
    a: Tensor
    b: Tensor


Rounder = Callable[[_Buffers], Tensor]
"""Rounds ``y`` onto a grid, into one of the buffers."""
Adder = Callable[[_Buffers, Tensor], Tensor]
"""Rounds ``y`` into the buffer given, which may be ``y``; every zero comes out as +0."""


def round_to(x: Tensor, fmt: str, rounding: str) -> Tensor:
    """See :func:`nybble.ops.rounding.round_to`."""
    rounder = _rounder(fmt, rounding)
    if rounder is None or x.numel() == 0:
        return _reference(rounding_ops.round_to)(x, fmt, rounding)
    flat = x.contiguous().view(-1)
    out = _empty(flat.shape, flat.dtype)
    with torch.inference_mode():
        for start, stop in _parts(flat.numel(), 1):
            chunk = _buffers(stop - start, 1)
            chunk.y.copy_(flat[start:stop].view(-1, 1))
            out[start:stop] = rounder(chunk).view(-1)
    return out.view(x.shape)


def encode(x: Tensor, fmt: str, rounding: str) -> Tensor:
    """See :func:`nybble.ops.rounding.encode`."""
    cells = _cells(fmt, rounding)
    if cells is None or x.numel() == 0:
        return _reference(rounding_ops.encode)(x, fmt, rounding)
    thresholds, _, _, lower, upper = cells
    flat = x.contiguous().view(-1)
    out = torch.empty(flat.shape, dtype=torch.uint8)
    with torch.inference_mode():
        for start, stop in _parts(flat.numel(), 1):
            y = flat[start:stop]
            cell = _cell(y)
            high = y >= thresholds.index_select(0, cell)
            torch.where(high, upper.index_select(0, cell), lower.index_select(0, cell), out=out[start:stop])
    return out.view(x.shape)


def decode(codes: Tensor, fmt: str) -> Tensor:
    """See :func:`nybble.ops.rounding.decode`."""
    table = decode_table(fmt, _CPU)
    flat = codes.contiguous().view(-1)
    out = _empty(flat.shape, torch.float32)
    with torch.inference_mode():
        for start, stop in _parts(flat.numel(), 1):
            torch.index_select(table, 0, flat[start:stop].int(), out=out[start:stop])
    return out.view(codes.shape)


def scaled_round(blocks: Tensor, scale: Tensor, fmt: str, rounding: str, reciprocal: bool = False) -> Tensor:
    """See :func:`nybble.ops.blocks.scaled_round`."""
    rounder = _rounder(fmt, rounding)
    if rounder is None or blocks.numel() == 0:
        return _reference(block_ops.scaled_round)(blocks, scale, fmt, rounding, reciprocal)
    divisor = block_ops.safe_reciprocal(scale) if reciprocal else block_ops.safe_divisor(scale)
    blocks = blocks.contiguous()
    out = _empty(blocks.shape, blocks.dtype)
    with torch.inference_mode():
        for x, by, s, to in _cut(blocks, divisor, scale, out):
            chunk = _buffers(*x.shape)
            (torch.mul if reciprocal else torch.div)(x.float(), by, out=chunk.y)
            _multiply(rounder(chunk), s, to)
    return out


def dynamic_round(blocks: Tensor, fmt: str, rounding: str, target: float, pow2: str, scale_dtype: str) -> Tensor:
    """See :func:`nybble.ops.blocks.dynamic_round`."""
    rounder = _rounder(fmt, rounding)
    if rounder is None or blocks.numel() == 0:
        return _reference(block_ops.dynamic_round)(blocks, fmt, rounding, target, pow2, scale_dtype)
    blocks = blocks.contiguous()
    count, columns = blocks.shape
    if columns > ALONE or not get_format(fmt).has_zero:  # without a zero a scale may be 0, which nothing divides by
        amax = blocks.abs().amax(1, keepdim=True).float()
        return scaled_round(blocks, block_ops.block_scale(amax, fmt, target, pow2, scale_dtype), fmt, rounding)
    out = _empty(blocks.shape, blocks.dtype)
    plain = not pow2 and scale_dtype == "float32"
    vanishing = math.ldexp(math.floor(target / 2), -149)  # the largest float32 whose quotient rounds to 0
    adder = _adder(fmt, rounding)
    with torch.inference_mode():
        for start, stop in _parts(count, columns):
            x, to = blocks[start:stop], out[start:stop]
            x = x if x.dtype == torch.float32 else x.float()
            chunk = _buffers(stop - start, columns)
            # The bits of magnitudes are ordered as integers, NaN on top: an integer maximum is a third of the work.
            amax = torch.abs(x, out=chunk.y).view(torch.int32).amax(1, keepdim=True).view(torch.float32)
            if plain:  # block_scale in two steps: what would divide to 0 becomes the target, and so 1
                scale = torch.threshold_(amax, vanishing, target).div_(target)
            else:
                scale = block_ops.block_scale(amax, fmt, target, pow2, scale_dtype)
            if adder is None:
                torch.div(x, scale, out=chunk.y)
                _multiply(rounder(chunk), scale, to)
                continue
            # Over a negated scale every zero comes back as -0, and adding 0 * x makes it +0 where x is positive: one
            # step instead of copying signs. (Infinity times 0 is NaN, as its block is anyhow.)
            torch.div(x, scale.neg_(), out=chunk.y)
            rounded = adder(chunk, chunk.y).mul_(scale)
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


def _parts(count: int, columns: int) -> Iterator[tuple[int, int]]:
    """``range(count)`` cut so that rows of ``columns`` elements make up chunks; asking for the next ends the last.

    Four small chunks on one thread show how fast that goes. Large ones on all threads follow, until one takes three
    times as long: then another process holds a core, and at every step all wait for the thread that lost it; small
    chunks finish.
    """
    threads = torch.get_num_threads()
    alone, shared = max(1, ALONE // columns), max(1, SHARED * threads // columns)
    alone_best, start, done = math.inf, 0, 0
    sharing, may_share = False, threads > 1 and count > shared
    begun = time.perf_counter()
    while start < count:
        stop = min(start + (shared if sharing else alone), count)
        yield start, stop
        now = time.perf_counter()
        took, begun, done = (now - begun) / (stop - start), now, done + 1
        start = stop
        if sharing:
            sharing = may_share = took <= 3 * alone_best
        else:
            alone_best = min(alone_best, took)
            sharing = may_share and done == 4


def _cut(
    blocks: Tensor, divisor: Tensor, scale: Tensor, out: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Chunks of all four, along blocks; also across them where they are few and long."""
    count, columns = blocks.shape
    if columns <= ALONE or scale.shape[1] != 1:
        for start, stop in _parts(count, columns):
            by, s = (t if t.shape[0] == 1 else t[start:stop] for t in (divisor, scale))
            yield blocks[start:stop], by, s, out[start:stop]
        return
    for row in range(count):
        x, by, s, to = (t[row : row + 1] for t in (blocks, divisor, scale, out))
        for start, stop in _parts(columns, 1):
            yield x[:, start:stop], by, s, to[:, start:stop]


def _buffers(rows: int, columns: int) -> _Buffers:
    """This thread's buffers of shape [rows, columns]; the next call gives the same memory."""
    shape = (3, rows, columns)
    if rows * columns > SHARED * torch.get_num_threads():
        return _Buffers(*torch.empty(shape))
    if getattr(_own, "shape", None) != shape:
        if getattr(_own, "size", 0) < rows * columns:
            _own.size, _own.memory = rows * columns, torch.empty(3, rows * columns)
        _own.shape, _own.chunk = shape, _Buffers(*_own.memory[:, : rows * columns].view(shape))
    chunk: _Buffers = _own.chunk
    return chunk


def _empty(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Memory for a result; a large one in huge pages where Linux has them, touched at once and on all threads.

    The first touch of 4,096-byte pages, one chunk at a time, costs as much as all the sums.
    """
    out = torch.empty(shape, dtype=dtype)
    advise = _madvise()
    if advise is not None and out.nbytes >= OWN_MAPPING:
        start = -(-out.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        advise(start, out.data_ptr() + out.nbytes - start, mmap.MADV_HUGEPAGE)  # advice: refused, it changes nothing
        out.view(-1)[:: 1024 // out.element_size()].zero_()
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


@lru_cache(maxsize=256)
def _rounder(fmt_name: str, rounding: str) -> Rounder | None:
    """A function that rounds a chunk onto the grid, or None."""
    fmt = get_format(fmt_name)
    adder = _adder(fmt_name, rounding)
    if adder is not None:
        return lambda chunk: adder(chunk, chunk.b).copysign_(chunk.y)
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


@lru_cache(maxsize=256)
def _adder(fmt_name: str, rounding: str) -> Adder | None:
    """The rounding by the float32 adder, or None where it can't."""
    fmt = get_format(fmt_name)
    if rounding != "nearest-even" or not isinstance(fmt, Minifloat) or not _adder_rounds(fmt):
        return None
    least, most, largest = 2.0**fmt.emin, 2.0**fmt.emax, fmt.max
    mask = torch.tensor(0x7F800000, dtype=torch.int32)
    factor = 1.5 * 2.0 ** (23 - fmt.m)  # c = factor * 2^E is exact

    def add_and_subtract(chunk: _Buffers, out: Tensor) -> Tensor:
        power = chunk.a
        torch.bitwise_and(chunk.y.view(torch.int32), mask, out=power.view(torch.int32))
        power.clamp_(least, most)
        torch.add(chunk.y, power, alpha=factor, out=out)
        return out.sub_(power, alpha=factor).clamp_(-largest, largest)

    return add_and_subtract


def _adder_rounds(fmt: Minifloat) -> bool:
    """Whether the float32 adder can do it: c stays finite and normal; with m = 0 its even is not the even code."""
    inside = fmt.emax + 24 - fmt.m <= 127 and fmt.emin >= -126
    return fmt.has_sign and fmt.specials != "fnuz" and fmt.m >= 1 and inside


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
