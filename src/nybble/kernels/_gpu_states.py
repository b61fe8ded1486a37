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
from nybble.kernels._gpu_blocks import divided, divisor, magnitude
from nybble.kernels._gpu_grids import ADDER, WHOLE, Way, code_of, way
from nybble.ops.rounding import decode_table

ABSENT, WIDE, BLOCKS, RANK1 = range(4)
"""How a state is kept: not at all, in float32, with a scale a block of neighbours, by rows and columns."""
GENERAL, DECADES, DECADES_ABOVE_0, COMPANDED, COMPANDED_ABOVE_0, SIXTEENTHS = range(6)
"""How the code of a number is found: as any format's, or by a guess (dynamic maps, companded ones, linear4)."""
_GUESSED = {
    "dynamic8": DECADES,
    "udynamic8": DECADES_ABOVE_0,
    "companded8": COMPANDED,
    "ucompanded8": COMPANDED_ABOVE_0,
}


@dataclass(frozen=True)
class Form:
    """How a kernel keeps one state.

    Attributes:
        meta: what is compiled in: kind, bits, elements of a block, how codes are found, whether a reciprocal is
            multiplied with, whether a scale of 0 becomes 1, what the largest magnitude is mapped to, and of
            :class:`~nybble.kernels._gpu_grids.Way` the grid and the coding.
        values: float32, of each code. thresholds: float32, ascending. way: of the format.
    """

    meta: tuple[Any, ...]
    values: Tensor
    thresholds: Tensor
    way: Way


@lru_cache(maxsize=256)
def form_of(
    kind: int, fmt: str, block: int, rounding: str, reciprocal: bool, target: float, device: torch.device
) -> Form:
    """Of a format of 4 or 8 bits; ABSENT and WIDE take any."""
    found, given = way(fmt, rounding, device), get_format(fmt)
    in_order = bool((given.grid_codes == np.arange(len(given.grid))).all())
    guess = _GUESSED.get(fmt, GENERAL) if in_order else GENERAL
    if fmt == "linear4" and rounding == "half-down":
        guess = SIXTEENTHS
    meta = (kind, given.bits, block, guess, reciprocal, given.has_zero, float(target), found.grid, found.coding)
    return Form(meta, decode_table(fmt, device), found.thresholds, found)


def regular(fmt: str, rounding: str) -> bool:
    """Whether a code is found without a search among many thresholds."""
    kind = way(fmt, rounding, torch.device("cpu")).grid[0]
    return kind in (ADDER, WHOLE) or fmt in _GUESSED or get_format(fmt).bits <= 4


@triton.jit
def spread(x, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """[TILE / BLOCK], one number for each block, as [TILE]."""
    return tl.reshape(tl.broadcast_to(x[:, None], (TILE // BLOCK, BLOCK)), (TILE,))


@triton.jit
def read_codes(pointer, start, count, BITS: tl.constexpr, TILE: tl.constexpr):
    """int32 [TILE], of elements from ``start`` on (even), of which there are ``count``."""
    data = pointer.to(tl.pointer_type(tl.uint8))
    if BITS == 8:
        at = tl.arange(0, TILE)
        return tl.load(data + start + at, mask=at < count, other=0).to(tl.int32)
    else:
        at = tl.arange(0, TILE // 2)
        pair = tl.load(data + start // 2 + at, mask=at * 2 < count, other=0).to(tl.int32)
        return tl.reshape(tl.join(pair & 15, pair >> 4), (TILE,))


@triton.jit
def write_codes(pointer, start, count, codes, BITS: tl.constexpr, TILE: tl.constexpr):
    """The inverse; half a byte behind the last code is 0."""
    data = pointer.to(tl.pointer_type(tl.uint8))
    if BITS == 8:
        at = tl.arange(0, TILE)
        tl.store(data + start + at, codes.to(tl.uint8), mask=at < count)
    else:
        codes = tl.where(tl.arange(0, TILE) < count, codes, 0)
        low, high = tl.split(tl.reshape(codes, (TILE // 2, 2)))
        at = tl.arange(0, TILE // 2)
        tl.store(data + start // 2 + at, (low | (high << 4)).to(tl.uint8), mask=at * 2 < count)


@triton.jit
def read_scales(pointer, start, count, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """float32 [TILE]: the scale of each element's block."""
    at = tl.arange(0, TILE // BLOCK)
    data = pointer.to(tl.pointer_type(tl.float32)) + start // BLOCK
    return spread(tl.load(data + at, mask=at * BLOCK < count, other=1.0), BLOCK, TILE)


@triton.jit
def measure_scales(pointer, start, count, x, META: tl.constexpr, TILE: tl.constexpr):
    """Scales of the blocks of ``x`` by their largest magnitudes, stored; float32 [TILE / BLOCK]."""
    BLOCK: tl.constexpr = META[2]
    TARGET: tl.constexpr = META[6]
    top = tl.max(tl.reshape(magnitude(x), (TILE // BLOCK, BLOCK)), 1).to(tl.float32, bitcast=True)
    if TARGET != 1.0:
        top = divided(top, tl.full(top.shape, TARGET, tl.float32))
    if META[5]:
        top = divisor(top)
    at = tl.arange(0, TILE // BLOCK)
    data = pointer.to(tl.pointer_type(tl.float32)) + start // BLOCK
    tl.store(data + at, top, mask=at * BLOCK < count)
    return top


@triton.jit
def scaled(x, scale, META: tl.constexpr, TILE: tl.constexpr):
    """``x / scale``, or times its reciprocal; a scale a block."""
    BLOCK: tl.constexpr = META[2]
    if META[4]:
        inverse = divided(tl.full(scale.shape, 1.0, tl.float32), divisor(scale))
        inverse = tl.minimum(inverse, 3.4028234663852886e38)
        return x * spread(inverse, BLOCK, TILE)
    else:
        return divided(x, spread(divisor(scale), BLOCK, TILE))


@triton.jit
def _nearest_in_decades(y, FIRST: tl.constexpr):
    """Which threshold of a dynamic map of 8 bits is nearest to y, within [-1, 1]."""
    a = tl.abs(y)
    decade = tl.floor(tl.log2(tl.maximum(a, 1e-7)) * 0.30102999566 + 7.0)
    decade = tl.minimum(tl.maximum(decade, 0.0), 6.0)
    steps = tl.exp2(decade * -2.321928094887362 + (20.083571672 + FIRST))  # 10**6 2**FIRST / 0.9 / 5**decade
    base = ((decade.to(tl.int32) + (127 + FIRST)) << 23).to(tl.float32, bitcast=True) * 0.8888888889
    above = (a * steps + (base - FIRST + 0.5)).to(tl.int32)
    above = tl.maximum(above, 1)
    if FIRST:
        return tl.minimum(above - 1, 254)
    else:
        return tl.minimum(tl.maximum(tl.where(y < 0, 127 - above, 126 + above), 0), 254)


@triton.jit
def _nearest_companded(y, ABOVE_0: tl.constexpr):
    if ABOVE_0:
        at = (tl.sqrt(y) * 256.0 - 1.0).to(tl.int32)
        return tl.minimum(tl.maximum(at, 0), 254)
    else:
        at = (y * 254.0 / (1.0 + tl.abs(y)) + 127.0).to(tl.int32)
        return tl.minimum(tl.maximum(at, 0), 253)


@triton.jit
def codes_of(y, thresholds, values, codes, META: tl.constexpr):
    """int32, of finite numbers over their scale."""
    GUESS: tl.constexpr = META[3]
    GRID: tl.constexpr = META[7]
    CODING: tl.constexpr = META[8]
    if GUESS == 0:
        return code_of(y, thresholds, values, codes, GRID, CODING)
    elif GUESS == 5:
        return tl.minimum(tl.maximum(tl.ceil(y * 16.0 - 1.5), 0.0), 15.0).to(tl.int32)  # all of it exact
    else:
        if GUESS == 1:
            at = _nearest_in_decades(y, 0)
        elif GUESS == 2:
            at = _nearest_in_decades(y, 1)
        elif GUESS == 3:
            at = _nearest_companded(y, False)
        else:
            at = _nearest_companded(y, True)
        return at + (y >= tl.load(thresholds + at)).to(tl.int32)


@triton.jit
def read_values(values, codes, META: tl.constexpr):
    """float32, of codes."""
    GUESS: tl.constexpr = META[3]
    if GUESS == 5:
        return (codes + 1).to(tl.float32) * 0.0625
    else:
        return tl.load(values + codes)
