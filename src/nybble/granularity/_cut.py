"""What granularities share: equal runs of neighbours, rows cut in pieces, and their messages."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nybble.core.errors import GranularityError, UsageError
from nybble.granularity import Granularity

if TYPE_CHECKING:
    from torch import Tensor


class Runs(Granularity):
    """One scale for each index of the leading dimensions: blocks are neighbours in memory, all of one length."""

    @abstractmethod
    def leading(self, shape: Sequence[int]) -> int:
        """How many dimensions of ``shape`` are the leading ones."""

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        lead = self.leading(shape)
        return (*shape[:lead], *(1,) * (len(shape) - lead))

    def to_blocks(self, x: Tensor) -> Tensor:
        lead = self.leading(x.shape)
        return x.reshape(math.prod(x.shape[:lead]), math.prod(x.shape[lead:]))

    def from_blocks(self, blocks: Tensor, shape: Sequence[int]) -> Tensor:
        return blocks.reshape(tuple(shape))

    def expand(self, scale: Tensor, shape: Sequence[int]) -> Tensor:
        return scale.reshape(self.scale_shape(shape))


def cut_rows(x: Tensor, size: int) -> Tensor:
    """Rows of the last dimension in pieces: [pieces, size]; a short last piece of a row ends in zeros."""
    short = -x.shape[-1] % size
    if short:
        import torch

        x = torch.nn.functional.pad(x, (0, short))
    return x.reshape(-1, size)


def join_rows(pieces: Tensor, shape: Sequence[int], size: int) -> Tensor:
    """Inverse of :func:`cut_rows`."""
    *lead, columns = shape
    if columns % size == 0:
        return pieces.reshape(tuple(shape))
    return pieces.reshape(*lead, -(-columns // size) * size)[..., :columns]


def need_dims(granularity: Granularity, shape: Sequence[int], dims: int) -> None:
    """Raise GranularityError for a tensor of fewer than ``dims`` dimensions."""
    if len(shape) < dims:
        raise GranularityError(
            f"'{granularity}' needs at least {dims} dimension(s); the tensor has shape {tuple(shape)}."
        )


def need_element(word: str, size: int, what: str) -> None:
    """Raise GranularityError for blocks without elements."""
    if size < 1:
        raise GranularityError(f"{word}={size}: {what} needs at least one element.")


def whole_numbers(word: str, value: str, examples: str, count: int = 1) -> tuple[int, ...]:
    """``count`` numbers with an ``x`` between them, as in ``block=16x16``.

    Raises:
        UsageError: it is something else; has the examples.
    """
    parts = value.lower().split("x")
    try:
        if len(parts) == count:
            return tuple(int(part) for part in parts)
    except ValueError:
        pass
    raise UsageError(f"{word}={value} is not a size. Examples: {examples}.")
