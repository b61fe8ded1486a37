"""Rounding one chunk on a CPU, two ways: by the float32 adder, or by table.

*Arithmetic on bit patterns* (minifloats, ties to even). For y with exponent E, adding c = 1.5 * 2^(E + 23 - m) moves
the rounding position of the float32 adder to the format's last mantissa bit, and subtracting c leaves y rounded, ties
to even. 2^E comes from masking y's exponent bits, held between the exponents of the format's subnormals and of its
largest value; c has a mantissa of 1.5 so that the sum stays in c's binade for either sign. Symmetric integers round
directly.

*Table look-up* (everything else up to 8 bits). The upper 16 bits of a float32 choose one of 65,536 cells; a cell with
at most one threshold needs one comparison: ``y >= threshold[cell] ? upper[cell] : lower[cell]``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from nybble.formats import NumberFormat, get_format
from nybble.formats.integer import IntFormat
from nybble.formats.minifloat import Minifloat
from nybble.kernels._chunks import Buffers

Rounder = Callable[[Buffers], Tensor]
"""Rounds ``y`` onto a grid, into one of the buffers."""
Adder = Callable[[Buffers, Tensor], Tensor]
"""Rounds ``y`` into the buffer given, which may be ``y``; every zero comes out as +0."""


@lru_cache(maxsize=256)
def rounder(fmt_name: str, rounding: str) -> Rounder | None:
    """A function that rounds a chunk onto the grid, or None."""
    fmt = get_format(fmt_name)
    adds = adder(fmt_name, rounding)
    if adds is not None:
        return lambda chunk: adds(chunk, chunk.b).copysign_(chunk.y)
    if rounding == "nearest-even" and isinstance(fmt, IntFormat):
        return lambda chunk: chunk.y.round_().clamp_(fmt.low, fmt.high).add_(0.0)  # the sum turns -0 into 0
    if rounding == "nearest-even" and fmt_name == "float16_e8m7":  # c would overflow; torch has the cast
        return lambda chunk: chunk.b.copy_(chunk.y.bfloat16()).clamp_(-fmt.max, fmt.max)
    found = cells(fmt_name, rounding)
    if found is None:
        return None
    thresholds, lower, upper, _, _ = found

    def look_up(chunk: Buffers) -> Tensor:
        y, a, b = (t.view(-1) for t in (chunk.y, chunk.a, chunk.b))
        at = cell(y)
        high = y >= torch.index_select(thresholds, 0, at, out=a)
        torch.index_select(upper, 0, at, out=a)
        torch.index_select(lower, 0, at, out=b)
        torch.where(high, a, b, out=y)
        return chunk.y

    return look_up


@lru_cache(maxsize=256)
def adder(fmt_name: str, rounding: str) -> Adder | None:
    """The rounding by the float32 adder, or None where it can't."""
    fmt = get_format(fmt_name)
    if rounding != "nearest-even" or not isinstance(fmt, Minifloat) or not _adder_rounds(fmt):
        return None
    least, most, largest = 2.0**fmt.emin, 2.0**fmt.emax, fmt.max
    mask = torch.tensor(0x7F800000, dtype=torch.int32)
    factor = 1.5 * 2.0 ** (23 - fmt.m)  # c = factor * 2^E is exact

    def add_and_subtract(chunk: Buffers, out: Tensor) -> Tensor:
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


def cell(y: Tensor) -> Tensor:
    """Upper 16 bits of each float32 as an index 0 .. 65535; negative numbers come first."""
    return y.view(torch.int32).bitwise_right_shift(16).add_(32768)


@lru_cache(maxsize=256)
def cells(fmt_name: str, rounding: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """Per cell: its threshold (NaN if none), lower and upper value, lower and upper code; None if a cell has two."""
    fmt: NumberFormat = get_format(fmt_name)
    if fmt.bits > 8:
        return None
    thresholds = fmt.thresholds(rounding)
    starts = np.arange(-32768, 32768, dtype=np.int32) << 16
    ends = np.stack([starts, starts | 0xFFFF]).view(np.float32)
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
            minus = (values == 0) & (starts < 0)
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
