# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""How Triton kernels round one element: by the float32 adder, to whole numbers, or by a search among thresholds.

As on a CPU (:mod:`nybble.kernels._rounders`): minifloats with ties to even by adding and taking away
1.5 * 2^(E + 23 - m), integers likewise; all else by counting the thresholds that aren't above y: one by one up to 16
values, else by halves.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.formats import NumberFormat, get_format
from nybble.formats.integer import IntFormat
from nybble.formats.minifloat import Minifloat
from nybble.ops.rounding import _tables
from nybble.rounding import get_rounding

ADDER, WHOLE, FEW, MANY = range(4)
"""The adder, integers, thresholds one by one, thresholds by halves."""
_FEW = 16


@dataclass(frozen=True)
class Way:
    """How a kernel rounds to a format.

    Attributes:
        thresholds, values: float32, of the grid. codes: int32, of its values; all on the GPU.
        grid: what is compiled into kernels: kind, count of values, whether zeros have a sign, smallest and largest
            value, the adder's factor, powers of two of the first and the last binade, steps of a search.
        coding: of those that give codes: mantissa bits, bias, place of the sign, mask, codes of NaN and of -0.
    """

    thresholds: Tensor
    values: Tensor
    codes: Tensor
    grid: tuple[Any, ...]
    coding: tuple[int, ...]


@lru_cache(maxsize=256)
def way(name: str, rounding: str, device: torch.device) -> Way:
    """How to round to a format on a device."""
    fmt = get_format(name)
    thresholds, values, codes = _tables(name, rounding, device)
    grid = counted(len(values), fmt.negative_zero is not None)
    even = rounding == "nearest-even" or _same_ties(fmt, rounding)
    coding = (0, 0, 0)
    if even and isinstance(fmt, IntFormat):
        grid = (WHOLE, *grid[1:3], float(fmt.low), float(fmt.high), 0.0, 0.0, 0.0, 0)
    elif even and isinstance(fmt, Minifloat) and adds(fmt):
        factor = 1.5 * 2.0 ** (23 - fmt.m)
        grid = (ADDER, *grid[1:3], fmt.min, fmt.max, factor, 2.0**fmt.emin, 2.0**fmt.emax, 0)
        coding = (fmt.m, fmt.bias, fmt.e + fmt.m)
    nan = int(fmt.grid_codes[-1]) if fmt.nan_code is None else fmt.nan_code
    return Way(thresholds, values, codes, grid, (*coding, 2**fmt.bits - 1, nan, fmt.negative_zero or 0))


def _same_ties(fmt: NumberFormat, rounding: str) -> bool:
    """Whether a rounding decides in this format as ties to even do: midpoints of integers are float32 numbers."""
    return isinstance(fmt, IntFormat) and get_rounding(rounding).name in ("nearest-even-code", "nearest-even-float32")


def counted(count: int, signed_zero: bool = False) -> tuple[Any, ...]:
    """``Way.grid`` of any ``count`` ascending values."""
    return (FEW if count <= _FEW else MANY, count, signed_zero, 0.0, 0.0, 0.0, 0.0, 0.0, halves(count))


def halves(count: int) -> int:
    """Steps in which one of ``count`` places is found."""
    return (count - 1).bit_length()


def adds(fmt: Minifloat) -> bool:
    """Whether the adder can do it: c stays finite and normal; with m = 0 its even is not the even code."""
    return fmt.m >= 1 and fmt.emin >= -126 and fmt.emax + 24 - fmt.m <= 127


@triton.jit
def rank(y, thresholds, COUNT: tl.constexpr, HALVES: tl.constexpr):
    """How many of the COUNT - 1 thresholds are <= y, found in HALVES steps; NaN is above all."""
    low = tl.zeros(y.shape, tl.int32)
    high = low + (COUNT - 1)
    for _ in tl.static_range(HALVES):
        middle = (low + high) >> 1
        edge = tl.load(thresholds + tl.minimum(middle, COUNT - 2))
        above = (low < high) & ((y >= edge) | (y != y))
        high = tl.where(above, high, middle)
        low = tl.where(above, middle + 1, low)
    return low


@triton.jit
def signed(found, y):
    """``found``, with the sign of y where it is zero."""
    minus = (y.to(tl.int32, bitcast=True) & -2147483648) | found.to(tl.int32, bitcast=True)
    return tl.where(found == 0, minus.to(tl.float32, bitcast=True), found)


@triton.jit
def whole(y):
    """Ties to even, for magnitudes below 2^22; zeros come out as +0."""
    return (y + 12582912.0) - 12582912.0


@triton.jit
def within(y, low, high):
    """Held between two bounds; NaN becomes one of them."""
    return tl.minimum(tl.maximum(y, low), high)


@triton.jit
def on_grid(y, thresholds, values, GRID: tl.constexpr):
    """The value that each y is rounded to, float32; NaN stays NaN."""
    KIND: tl.constexpr = GRID[0]
    COUNT: tl.constexpr = GRID[1]
    HALVES: tl.constexpr = GRID[8]
    if KIND == 0:
        power = (y.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        power = within(power, GRID[6], GRID[7]) * GRID[5]
        found = within((y + power) - power, GRID[3], GRID[4])
    elif KIND == 1:
        found = whole(within(y, GRID[3], GRID[4]))
    elif KIND == 2:
        found = tl.zeros(y.shape, tl.float32) + tl.load(values)
        for i in tl.static_range(COUNT - 1):
            found = tl.where(y >= tl.load(thresholds + i), tl.load(values + i + 1), found)
    else:
        found = tl.load(values + rank(y, thresholds, COUNT, HALVES))
    if GRID[2]:
        found = signed(found, y)
    return tl.where(y != y, y, found)


@triton.jit
def code_of(y, thresholds, values, codes, GRID: tl.constexpr, CODING: tl.constexpr):
    """The code of the value that each y is rounded to, int32."""
    KIND: tl.constexpr = GRID[0]
    COUNT: tl.constexpr = GRID[1]
    HALVES: tl.constexpr = GRID[8]
    if KIND < 2:
        found = on_grid(tl.where(y != y, 0.0, y), thresholds, values, GRID)
        if KIND == 1:
            code = found.to(tl.int32) & CODING[3]
        else:
            MANTISSA: tl.constexpr = CODING[0]
            FIRST: tl.constexpr = (127 - CODING[1]) << MANTISSA
            STEPS: tl.constexpr = 1 << MANTISSA
            SMALL: tl.constexpr = 1.0 / GRID[6]
            bits = found.to(tl.int32, bitcast=True)
            magnitude = tl.abs(found)
            normal = ((bits & 0x7FFFFFFF) >> (23 - MANTISSA)) - FIRST
            subnormal = ((magnitude * SMALL) * STEPS).to(tl.int32)
            code = tl.where(magnitude >= GRID[6], normal, subnormal) | (((bits >> 31) & 1) << CODING[2])
    else:
        at = rank(y, thresholds, COUNT, HALVES)
        code = tl.load(codes + at)
        if GRID[2]:
            code = tl.where((tl.load(values + at) == 0) & (y.to(tl.int32, bitcast=True) < 0), CODING[5], code)
    return tl.where(y != y, CODING[4], code)
