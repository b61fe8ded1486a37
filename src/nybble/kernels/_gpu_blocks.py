# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""How ``[blocks, elements]`` is cut into tiles for Triton's programs, and how these read it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.kernels._gpu import elsewhere

TILE = 2048
"""Elements of a tile."""
LONGEST = 1 << 16
"""Elements of a block up to which one program goes through all of it."""
EXACT: dict[str, Any] = {"enable_fp_fusion": False}
"""Options of every launch: a product and a sum contracted into one would be rounded once."""


@dataclass(frozen=True)
class Cut:
    """Tiles of whole blocks, or (``across``) of one block's elements.

    Attributes:
        rows, columns: of a tile, powers of two.
        programs: the grid of programs: along blocks, along elements.
    """

    rows: int
    columns: int
    programs: tuple[int, int]


def cut(blocks: int, elements: int, *, across: bool, tile: int = TILE) -> Cut:
    """Tiles for a number of blocks and of their elements.

    Args:
        blocks: how many.
        elements: of each.
        across: whether a block may be cut among several programs.
        tile: elements.
    """
    columns = min(tile, 1 << max(0, elements - 1).bit_length())
    rows = max(1, min(tile // columns, 1 << max(0, blocks - 1).bit_length()))
    return Cut(rows, columns, (-(-blocks // rows), -(-elements // columns) if across else 1))


def steps(side: Tensor, elements: int) -> tuple[int, int]:
    """Elements of memory from one block to the next, and from one of its elements to the next; 0 where all share."""
    rows, columns = side.shape
    return (0 if rows == 1 else side.stride(0)), (0 if columns == 1 else side.stride(1))


@contextmanager
def on(x: Tensor) -> Iterator[None]:
    """The device of ``x`` as the current one, where kernels are launched."""
    if elsewhere(x):  # to enter the one that is current takes as long as a launch
        with torch.cuda.device(x.device):
            yield
    else:
        yield


@triton.jit
def magnitude(x):
    """Bits of |x| as an integer, in whose order NaN is the largest."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def divisor(scale):
    """:func:`nybble.ops.blocks.safe_divisor`."""
    return tl.where(scale == 0, 1.0, scale)


@triton.jit
def divided(x, by):
    """``x / by``, rounded as IEEE says; ``by`` may broadcast."""
    return tl.math.div_rn(x, tl.zeros(x.shape, tl.float32) + by)
