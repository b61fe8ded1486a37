# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""A state's codes and scales inside a Triton kernel: float32 and back, one tile of a flattened tensor at a time.

The code of a number is how many thresholds are not above it. Maps of 8 bits are so regular that the nearest threshold
is known but for some rounding of the guess, which changes nothing: one comparison with that threshold decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.formats import get_format
from nybble.kernels._gpu import INTERPRETED
from nybble.kernels._gpu_blocks import divided, divisor, magnitude
from nybble.kernels._gpu_exact import floors, fused, over_blocks, quotients, spread
from nybble.kernels._gpu_grids import ADDER, WHOLE, Way, code_of, way
from nybble.ops.rounding import decode_table

HOST: tl.constexpr = tl.constexpr(INTERPRETED)
ABSENT, WIDE, BLOCKS, RANK1 = range(4)
"""How a state is kept: not at all, in float32, with a scale a block of neighbours, by rows and columns."""
GENERAL, DECADES, DECADES_ABOVE_0, COMPANDED, COMPANDED_ABOVE_0, SIXTEENTHS = range(6)
"""How the code of a number is found: as any format's, or by a guess (dynamic maps, companded ones, linear4)."""
_GUESSED = {
    "dynamic8": DECADES,
    "udynamic8": DECADES_ABOVE_0,
    "dynamic4": DECADES,
    "udynamic4": DECADES_ABOVE_0,
    "companded8": COMPANDED,
    "ucompanded8": COMPANDED_ABOVE_0,
}


@dataclass(frozen=True)
class Form:
    """How a kernel keeps one state.

    Attributes:
        meta: what is compiled in: kind, bits, elements of a block, how codes are found, whether a reciprocal is
            multiplied with, whether a scale of 0 becomes 1, what the largest magnitude is mapped to, of
            :class:`~nybble.kernels._gpu_grids.Way` the grid and the coding, and whether all thresholds but 0 are so
            large that :func:`~nybble.kernels._gpu_exact.over_blocks` decides; whether tables are read through shared
            memory.
        values: float32, of each code. thresholds: float32, ascending, -Inf before them for a guess. way: of the format.
    """

    meta: tuple[Any, ...]
    values: Tensor
    thresholds: Tensor
    way: Way


@lru_cache(maxsize=256)
def form_of(
    kind: int,
    fmt: str,
    block: int,
    rounding: str,
    reciprocal: bool,
    target: float,
    device: torch.device,
    near: bool = False,
) -> Form:
    """Of a format of 4 or 8 bits; ABSENT and WIDE take any."""
    found, given = way(fmt, rounding, device), get_format(fmt)
    in_order = bool((given.grid_codes == np.arange(len(given.grid))).all())
    guess = _GUESSED.get(fmt, GENERAL) if in_order else GENERAL
    if fmt == "linear4" and rounding == "half-down":
        guess = SIXTEENTHS
    thresholds = found.thresholds
    coarse = bool((thresholds.abs()[thresholds != 0] > 2.0**-30).all())
    zero, target = given.has_zero, float(target)
    meta = (kind, given.bits, block, guess, reciprocal, zero, target, found.grid, found.coding, coarse, near)
    if guess not in (GENERAL, SIXTEENTHS):  # a guess may be the place before the first one, which nothing is below
        thresholds = torch.cat([thresholds.new_full((1,), -torch.inf), thresholds])
    return Form(meta, decode_table(fmt, device), thresholds, found)


def regular(fmt: str, rounding: str) -> bool:
    """Whether a code is found without a search among many thresholds."""
    kind = way(fmt, rounding, torch.device("cpu")).grid[0]
    return kind in (ADDER, WHOLE) or fmt in _GUESSED or get_format(fmt).bits <= 4


@triton.jit
def place(start, left, width, UNIT: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr):
    """Where runs of UNIT elements lie, in such runs, and which of them there are: of a tile that begins at ``start``.

    Tiles are neighbours in memory, of which ``left`` are left, or, where COLUMNS are given, rectangles of a matrix that
    ``width`` is cut into, and then ``left`` rows are.
    """
    k = tl.arange(0, TILE // UNIT)
    if COLUMNS == 0:
        if ALIGNED:  # so that the compiler sees that what a thread reads at once is there or not
            left = left // 16 * (16 // UNIT)
        else:
            left = tl.cdiv(left, UNIT)
        return start // UNIT + k, k < left
    else:
        r = k // (COLUMNS // UNIT)
        across = width // COLUMNS * (COLUMNS // UNIT)  # as a product, of which the compiler knows what divides it
        return start // UNIT + (r * across + k % (COLUMNS // UNIT)), r < left


@triton.jit
def read_codes(
    pointer, start, left, width, BITS: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr
):
    """int32 [TILE]."""
    data = pointer.to(tl.pointer_type(tl.uint8))
    if ALIGNED:
        data = tl.multiple_of(data, 16)
    at, inside = place(start, left, width, 8 // BITS, TILE, COLUMNS, ALIGNED)
    return halves(tl.load(data + at, mask=inside, other=0).to(tl.int32), BITS)


@triton.jit
def halves(found, BITS: tl.constexpr):
    """Codes of bytes, of 4 bits in the order of memory."""
    if BITS == 4:
        pairs = tl.join(found & 15, found >> 4)
        if len(found.shape) == 1:
            found = tl.reshape(pairs, (found.shape[0] * 2,))
        else:
            found = tl.reshape(pairs, (found.shape[0], found.shape[1] * 2))
    return found


@triton.jit
def write_codes(
    pointer, start, left, width, codes, inside, BITS: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """The inverse; half a byte behind the last code is 0."""
    data = pointer.to(tl.pointer_type(tl.uint8))
    if ALIGNED:
        data = tl.multiple_of(data, 16)
    at, there = place(start, left, width, 8 // BITS, TILE, COLUMNS, ALIGNED)
    if BITS == 4:
        if not ALIGNED:
            codes = tl.where(inside, codes, 0)
        low, high = tl.split(tl.reshape(codes, (TILE // 2, 2)))
        codes = low | (high << 4)
    tl.store(data + at, codes.to(tl.uint8), mask=there)


@triton.jit
def read_scales(pointer, start, left, width, BLOCK: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr):
    """float32 [TILE]: the scale of each element's block."""
    at, inside = place(start, left, width, BLOCK, TILE, COLUMNS, False)
    scale = tl.load(pointer.to(tl.pointer_type(tl.float32)) + at, mask=inside, other=1.0)
    return spread(scale, BLOCK, TILE)


@triton.jit
def tops(x, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """int32 [TILE / BLOCK]: bits of the largest magnitude of each block."""
    return tl.max(tl.reshape(magnitude(x), (TILE // BLOCK, BLOCK)), 1)


@triton.jit
def write_scales(pointer, start, left, width, top, META: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr):
    """Scales of blocks by their :func:`tops`, stored; float32 [TILE / BLOCK]."""
    TARGET: tl.constexpr = META[6]
    scale = top.to(tl.float32, bitcast=True)
    if TARGET != 1.0:
        scale = divided(scale, tl.full(scale.shape, TARGET, tl.float32))
    if META[5]:
        scale = divisor(scale)
    at, inside = place(start, left, width, META[2], TILE, COLUMNS, False)
    tl.store(pointer.to(tl.pointer_type(tl.float32)) + at, scale, mask=inside)
    return scale


@triton.jit
def _power_of_two(x):
    """2 to a small power, to 20 bits or so: a guess needs no more, and no care for subnormal numbers."""
    if HOST:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, True, 1)


@triton.jit
def _signed(x, y):
    """``x`` from 0 on, with the sign of ``y``."""
    minus = y.to(tl.int32, bitcast=True) & -2147483648
    return (x.to(tl.int32, bitcast=True) | minus).to(tl.float32, bitcast=True)


@triton.jit
def _full(x, number: tl.constexpr):
    return tl.full(x.shape, number, tl.float32)


@triton.jit
def _nearest_in_decades(y, FIRST: tl.constexpr, BITS: tl.constexpr):
    """Which threshold of a dynamic map of 8 or 4 bits is nearest to y, within [-1, 1]; 1 is the first one, 0 before it.

    The decade of |y| comes from its bits, which are a logarithm but for less than a tenth of a power of two: at its
    ends a decade may as well be taken for its neighbour, by up to one of the lower one's steps.
    """
    a = tl.abs(y)
    LEAST: tl.constexpr = 870548090 if BITS == 8 else 981385955  # bits of 10**-7, of 10**-3
    STEPS: tl.constexpr = (20.083571662769224 if BITS == 8 else 6.795859283219775) + FIRST
    decade = tl.minimum((tl.maximum(a.to(tl.int32, bitcast=True) - LEAST, 0) >> 9) * 155 >> 23, BITS - 2)
    # 10**(BITS - 2) 2**FIRST / 0.9 / 5**decade
    steps = _power_of_two(fused(decade.to(tl.float32), _full(y, -2.321928094887362), _full(y, STEPS)))
    base = ((decade + (127 + FIRST)) << 23).to(tl.float32, bitcast=True)
    found = fused(a, steps, fused(base, _full(y, 0.8888888889), _full(y, -0.5)))
    if FIRST:
        return floors(found, 0)
    else:
        return floors(_signed(found, y), 128 if BITS == 8 else 8)


@triton.jit
def _nearest_of_few(y):
    """The same of the dynamic map of 4 bits with both signs: |y| on three lines, on which thresholds lie apart."""
    a = tl.abs(y)
    line = tl.minimum(fused(a, _full(y, 22.2), _full(y, 1.28)), fused(a, _full(y, 4.44), _full(y, 3.0)))
    return floors(_signed(tl.minimum(a * 100.0, line), y), 8)


@triton.jit
def _nearest_companded(y, ABOVE_0: tl.constexpr):
    if ABOVE_0:
        at = (tl.sqrt(y) * 256.0).to(tl.int32)
        return tl.minimum(tl.maximum(at, 1), 255)
    else:
        at = (y * 254.0 / (1.0 + tl.abs(y)) + 128.0).to(tl.int32)
        return tl.minimum(tl.maximum(at, 1), 254)


@triton.jit
def _nearest(y, META: tl.constexpr):
    """Which threshold is nearest to y; 0 stands for one below all."""
    GUESS: tl.constexpr = META[3]
    if GUESS == 1 and META[1] == 4:
        return _nearest_of_few(y)
    elif GUESS == 1:
        return _nearest_in_decades(y, 0, META[1])
    elif GUESS == 2:
        return _nearest_in_decades(y, 1, META[1])
    elif GUESS == 3:
        return _nearest_companded(y, False)
    else:
        return _nearest_companded(y, True)


@triton.jit
def _looked_up(table, at, META: tl.constexpr):
    """Numbers of a table with one for each code."""
    if META[10]:
        flat = tl.reshape(at, (at.numel,))
        return tl.reshape(tl.gather(tl.load(table + tl.arange(0, 1 << META[1])), flat, 0), at.shape)
    else:
        return tl.load(table + at)


@triton.jit
def codes_of(y, thresholds, values, codes, META: tl.constexpr):
    """int32, of finite numbers over their scale."""
    GUESS: tl.constexpr = META[3]
    if GUESS == 0:
        GRID: tl.constexpr = META[7]
        CODING: tl.constexpr = META[8]
        return code_of(y, thresholds, values, codes, GRID, CODING)
    elif GUESS == 5:
        # 15 - ceil(16 y - 1.5), all of it exact; y is at most 1
        return floors(fused(tl.maximum(y, 0.09375), _full(y, -16.0), _full(y, 1.5)), 15) ^ 15
    else:
        at = _nearest(y, META)
        return at - (y < _looked_up(thresholds, at, META)).to(tl.int32)


@triton.jit
def codes_over(
    x, scale, is_usual, thresholds, values, codes, META: tl.constexpr, PER_BLOCK: tl.constexpr, TILE: tl.constexpr
):
    """int32 [TILE], of ``x / scale``; scales of elements, or PER_BLOCK, and then whether they are usual."""
    by = divisor(scale)
    if not PER_BLOCK:
        y = quotients(x, by)
    elif META[4]:
        inverse = tl.minimum(divided(tl.full(by.shape, 1.0, tl.float32), by), 3.4028234663852886e38)
        y = x * spread(inverse, META[2], TILE)
    elif META[9]:
        if is_usual:
            y = over_blocks(x, by, META[2], TILE)
        else:
            y = divided(x, spread(by, META[2], TILE))
    else:
        y = quotients(x, spread(by, META[2], TILE))
    return codes_of(y, thresholds, values, codes, META)


@triton.jit
def read_values(values, codes, META: tl.constexpr):
    """float32, of codes."""
    GUESS: tl.constexpr = META[3]
    if GUESS == 5:
        return ((codes << 19) | 0x3F800000).to(tl.float32, bitcast=True) - 0.9375  # (1 + code / 16) - 15 / 16
    else:
        return _looked_up(values, codes, META)
