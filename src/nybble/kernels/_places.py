"""Where the scales of a packed matrix lie, and what a kernel keeps beside its codes: the same for every device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from nybble.granularity import Granularity, make_granularity

Made = TypeVar("Made")


@lru_cache(maxsize=4096)
def blocks_of(granularity: str, n: int, k: int) -> tuple[int, int, int] | None:
    """How the scales of a matrix [n, k] are placed.

    Returns:
        columns of a block (of the last one in a row perhaps fewer), blocks in a row, rows that share them; None where
        the blocks lie in no such order.
    """
    found: Granularity = make_granularity(granularity)
    shape = found.scale_shape((n, k))
    total = math.prod(shape)
    if len(shape) == 2:
        across, down = shape[1], shape[0]
    elif total and n * k % total == 0 and k % (n * k // total) == 0:
        across, down = k * total // (n * k), n
    else:
        return None
    columns = getattr(found, "size", 0) if found.uneven((n, k)) else k // max(across, 1)
    if not columns or not down or n % down or -(-k // columns) != across:
        return None
    share = n // down
    rows = min(n, 2 * share)  # of which the order shows
    number = found.to_blocks(torch.zeros(rows, k))
    index = torch.arange(number.shape[0], dtype=torch.float64).view(-1, 1).expand(number.shape)
    order = found.from_blocks(index, (rows, k)).reshape(rows, k)
    row, column = torch.arange(rows).view(-1, 1), torch.arange(k).view(1, -1)
    wanted = (row // share) * across + column // columns
    return (columns, across, share) if torch.equal(order, wanted.double()) else None


@lru_cache(maxsize=4096)
def outer_block(granularity: str, shape: tuple[int, ...], count: int) -> int | None:
    """How many neighbours in memory share an outer scale; None where those that do aren't neighbours.

    Args:
        granularity: of the scales' own scales.
        shape: of the scales.
        count: of outer scales.
    """
    total = math.prod(shape)
    if count == 1:
        return total
    found = make_granularity(granularity)
    blocks = found.to_blocks(torch.zeros(shape))
    if len(blocks) != count:
        return None
    order = found.from_blocks(torch.arange(count, dtype=torch.float64).view(-1, 1).expand(blocks.shape), shape)
    size = int((order.reshape(-1) == 0).sum())
    return size if torch.equal(order.reshape(-1).long(), torch.arange(total) // size) else None


def kept_with(tensors: Sequence[Tensor], key: str, name: str, make: Callable[[], Made]) -> Made:
    """What a kernel made of a weight, kept with its codes as long as the same tensors come with them.

    Args:
        tensors: of the weight, its codes first.
        key: of :func:`nybble.nn.compiled.key_of`.
        name: of the attribute of the codes that holds it; one of each kind of thing that is made.
        make: called where there is none, or one of other tensors.
    """
    first = tensors[0]
    kept = getattr(first, name, None)
    if kept is not None and kept[0] == key and all(a is b for a, b in zip(kept[1], tensors[1:], strict=True)):
        found: Made = kept[2]
        return found
    made = make()
    setattr(first, name, (key, tuple(tensors[1:]), made))
    return made
