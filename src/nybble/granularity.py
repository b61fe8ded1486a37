"""Who shares a scale: the view of a tensor as ``[blocks, elements]`` and back.

Formats, roundings and scale rules see only blocks, so nothing above this file branches on granularity.

===========  =======================================  ==================  ==========================
granularity  elements of one block                    shape of x          shape of its scale
===========  =======================================  ==================  ==========================
tensor       all                                      [4, 64]             [1, 1]
channel      all of one index of dimension 0          [4, 64]             [4, 1]
token        one row of the last dimension            [2, 5, 64]          [2, 5, 1]
plane        one channel of one image                 [4, 3, 8, 8]        [4, 3, 1, 1]
group=32     32 neighbours in the last dimension      [4, 64]             [4, 2]
block=2x32   a tile of the last two dimensions        [4, 64]             [2, 2]
flat=48      48 neighbours in row-major order         [4, 64]             [6] (the tail is shorter)
rank1        all of one index of each dimension       [4, 64]             factors [4, 1] and [1, 64]
shifted      all, each column by a power of two       [4, 64]             factors [1, 1] and [1, 64]
===========  =======================================  ==================  ==========================
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.core.errors import GranularityError, UsageError


class Granularity(ABC):
    """A partition of a tensor's elements into blocks that share one scale; every element is in exactly one."""

    @abstractmethod
    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the scale of a tensor of ``shape``; its product is the number of blocks."""

    @abstractmethod
    def to_blocks(self, x: Tensor) -> Tensor:
        """View (a copy where memory order demands it) of ``x`` as ``[blocks, elements]``; short blocks end in zeros."""

    @abstractmethod
    def from_blocks(self, blocks: Tensor, shape: Sequence[int]) -> Tensor:
        """Inverse of :meth:`to_blocks`: ``[blocks, elements]`` back to ``shape``."""

    def mask(self, shape: Sequence[int], device: torch.device | None = None) -> Tensor | None:
        """``[blocks, elements]``, true on real elements; None where no block is padded."""
        padded = math.prod(self.scale_shape(shape)) and self.to_blocks(torch.empty(shape, device="meta")).numel()
        if padded == math.prod(shape):
            return None
        return self.to_blocks(torch.ones(tuple(shape), device=device)) > 0

    def expand(self, scale: Tensor, shape: Sequence[int]) -> Tensor:
        """One value a block (``scale_shape(shape)``) as a tensor that broadcasts against ``shape``."""
        elements = self.to_blocks(torch.empty(shape, device="meta")).shape[1]
        return self.from_blocks(scale.reshape(-1, 1).expand(-1, elements), shape)

    def factor_blocks(self, scale: Tensor, shape: Sequence[int]) -> Tensor:
        """A factored scale, expanded so that it broadcasts against ``shape``, as it broadcasts against the blocks."""
        return self.to_blocks(scale.expand(tuple(shape)))

    def check(self, shape: Sequence[int]) -> None:
        """Raise GranularityError when a tensor of ``shape`` can't be cut; the message has sizes that fit."""
        self.scale_shape(shape)


@dataclass(frozen=True)
class PerTensor(Granularity):
    """One scale for all."""

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:  # noqa: D102
        return (1,) * len(shape)

    def to_blocks(self, x: Tensor) -> Tensor:  # noqa: D102
        return x.reshape(1, -1)

    def from_blocks(self, blocks: Tensor, shape: Sequence[int]) -> Tensor:  # noqa: D102
        return blocks.reshape(tuple(shape))

    def expand(self, scale: Tensor, shape: Sequence[int]) -> Tensor:  # noqa: D102
        return scale.reshape((1,) * len(shape))

    def __str__(self) -> str:
        return "tensor"


@dataclass(frozen=True)
class PerChannel(Granularity):
    """One scale for each index of dimension 0 (output channels of a weight)."""

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:  # noqa: D102
        _needs_dims(self, shape, 1)
        return (shape[0], *(1,) * (len(shape) - 1))

    def to_blocks(self, x: Tensor) -> Tensor:  # noqa: D102
        _needs_dims(self, x.shape, 1)
        return x.reshape(x.shape[0], math.prod(x.shape[1:]))

    def from_blocks(self, blocks: Tensor, shape: Sequence[int]) -> Tensor:  # noqa: D102
        return blocks.reshape(tuple(shape))

    def expand(self, scale: Tensor, shape: Sequence[int]) -> Tensor:  # noqa: D102
        return scale.reshape(self.scale_shape(shape))

    def __str__(self) -> str:
        return "channel"


@dataclass(frozen=True)
class PerToken(Granularity):
    """One scale for each row of the last dimension."""

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:  # noqa: D102
        _needs_dims(self, shape, 1)
        return (*shape[:-1], 1)

    def to_blocks(self, x: Tensor) -> Tensor:  # noqa: D102
        _needs_dims(self, x.shape, 1)
        return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])

    def from_blocks(self, blocks: Tensor, shape: Sequence[int]) -> Tensor:  # noqa: D102
        return blocks.reshape(tuple(shape))

    def expand(self, scale: Tensor, shape: Sequence[int]) -> Tensor:  # noqa: D102
        return scale.reshape(self.scale_shape(shape))

    def __str__(self) -> str:
        return "token"


@dataclass(frozen=True)
class PerPlane(Granularity):
    """One scale for each index of the first two dimensions: a channel of an image, or of a signal.

    Vectors [images, width] have one scale each, so that a line serves a convolutional network and its classifier.
    """

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:  # noqa: D102
        _needs_dims(self, shape, 2)
        lead = 2 if len(shape) > 2 else 1
        return (*shape[:lead], *(1,) * (len(shape) - lead))

    def to_blocks(self, x: Tensor) -> Tensor:  # noqa: D102
        blocks = math.prod(self.scale_shape(x.shape))
        return x.reshape(blocks, x.numel() // max(blocks, 1))

    def from_blocks(self, blocks: Tensor, shape: Sequence[int]) -> Tensor:  # noqa: D102
        return blocks.reshape(tuple(shape))

    def expand(self, scale: Tensor, shape: Sequence[int]) -> Tensor:  # noqa: D102
        return scale.reshape(self.scale_shape(shape))

    def __str__(self) -> str:
        return "plane"


@dataclass(frozen=True)
class PerGroup(Granularity):
    """One scale for each ``size`` neighbours of the last dimension.

    Args:
        size: elements of a group; must divide the last dimension, unless
        pad: the last group of each row may be short (it owns its scale; no padding element is stored).
    """

    size: int
    pad: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise GranularityError(f"group={self.size}: a group needs at least one element.")

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:  # noqa: D102
        _needs_dims(self, shape, 1)
        columns = shape[-1]
        if columns % self.size and not self.pad:
            raise GranularityError(
                f"{columns} columns, and group={self.size} does not divide them. Sizes that do: "
                f"{fitting_sizes(columns)}. Or 'pad=true' for a shorter last group, or 'channel' for one scale a row."
            )
        return (*shape[:-1], -(-columns // self.size))

    def to_blocks(self, x: Tensor) -> Tensor:  # noqa: D102
        self.scale_shape(x.shape)
        short = -x.shape[-1] % self.size
        if short:
            x = torch.nn.functional.pad(x, (0, short))
        return x.reshape(-1, self.size)

    def from_blocks(self, blocks: Tensor, shape: Sequence[int]) -> Tensor:  # noqa: D102
        *lead, columns = shape
        if columns % self.size == 0:
            return blocks.reshape(tuple(shape))
        return blocks.reshape(*lead, -(-columns // self.size) * self.size)[..., :columns]

    def __str__(self) -> str:
        return f"group={self.size}" + (" pad=true" if self.pad else "")


@dataclass(frozen=True)
class PerBlock(Granularity):
    """One scale for each ``rows`` x ``columns`` tile of the last two dimensions."""

    rows: int
    columns: int

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:  # noqa: D102
        _needs_dims(self, shape, 2)
        *lead, r, c = shape
        for have, size, what in ((r, self.rows, "rows"), (c, self.columns, "columns")):
            if size < 1 or have % size:
                raise GranularityError(
                    f"{have} {what}, and {self} does not divide them. Sizes that do: {fitting_sizes(have)}."
                )
        return (*lead, r // self.rows, c // self.columns)

    def to_blocks(self, x: Tensor) -> Tensor:  # noqa: D102
        *lead, r, c = self.scale_shape(x.shape)
        tiles = x.reshape(*lead, r, self.rows, c, self.columns).transpose(-3, -2)
        return tiles.reshape(-1, self.rows * self.columns)

    def from_blocks(self, blocks: Tensor, shape: Sequence[int]) -> Tensor:  # noqa: D102
        *lead, r, c = self.scale_shape(shape)
        return blocks.reshape(*lead, r, c, self.rows, self.columns).transpose(-3, -2).reshape(tuple(shape))

    def __str__(self) -> str:
        return f"block={self.rows}x{self.columns}"


@dataclass(frozen=True)
class Flat(Granularity):
    """One scale for each ``size`` neighbours in row-major order; the last block may be short and owns its scale."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise GranularityError(f"flat={self.size}: a block needs at least one element.")

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:  # noqa: D102
        return (-(-math.prod(shape) // self.size),)

    def to_blocks(self, x: Tensor) -> Tensor:  # noqa: D102
        flat = x.reshape(-1)
        short = -flat.numel() % self.size
        if short:
            flat = torch.nn.functional.pad(flat, (0, short))
        return flat.reshape(-1, self.size)

    def from_blocks(self, blocks: Tensor, shape: Sequence[int]) -> Tensor:  # noqa: D102
        return blocks.reshape(-1)[: math.prod(shape)].reshape(tuple(shape))

    def __str__(self) -> str:
        return f"flat={self.size}"


@dataclass(frozen=True)
class Rank1(PerTensor):
    """One factor for each index of each dimension; an element's scale combines them (4-bit optimizer states).

    Li et al. 2023, arXiv:2309.01507: scale = min over dimensions of the slice maxima. The scale rule sees the whole
    tensor as one block; the quantizer makes the factors, and only the factored scale knows how they combine.
    """

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:  # noqa: D102
        _needs_dims(self, shape, 1)
        return super().scale_shape(shape)

    def __str__(self) -> str:
        return "rank1"


@dataclass(frozen=True)
class Shifted(PerTensor):
    """One scale for all, times a power of two ``2^-s_j`` for each index of the last dimension.

    LLM-FP4's pre-shifted exponent bias (Liu et al. 2023, arXiv:2310.16836): the exponents can move from an activation
    to the weight that it meets, so a product of two such tensors needs one scale. Loud columns get s_j = 0.

    Args:
        bits: of a shift, 0 <= s_j < 2^bits; 0 takes as many as the format has exponent bits, as the paper does.
    """

    bits: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.bits <= 5:
            raise GranularityError(f"shifted={self.bits}: a shift has 1 to 5 bits (or leave the number out).")

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:  # noqa: D102
        _needs_dims(self, shape, 1)
        return super().scale_shape(shape)

    def to_blocks(self, x: Tensor) -> Tensor:  # noqa: D102
        return x.reshape(-1, x.shape[-1])

    def expand(self, scale: Tensor, shape: Sequence[int]) -> Tensor:  # noqa: D102
        return scale.reshape(*(1,) * (len(shape) - 1), scale.numel())  # the tensor's factor, or the columns'

    def factor_blocks(self, scale: Tensor, shape: Sequence[int]) -> Tensor:  # noqa: D102
        return scale.expand(*(1,) * (len(shape) - 1), shape[-1]).reshape(1, -1)

    def __str__(self) -> str:
        return f"shifted={self.bits}" if self.bits else "shifted"


def fitting_sizes(count: int, smallest: int = 8, most: int = 8) -> str:
    """Divisors of ``count`` worth offering as a group size, as text: multiples of 16 first if there are any."""
    divisors = [d for d in range(smallest, count + 1) if count % d == 0] or [
        d for d in range(1, count + 1) if count % d == 0
    ]
    even = [d for d in divisors if d % 16 == 0]
    return ", ".join(str(d) for d in (even or divisors)[:most])


def parse_granularity(words: dict[str, str]) -> Granularity | None:
    """Take a granularity out of the words of a quantizer line, or None when it names none.

    Recognised: ``tensor``, ``channel``, ``token``, ``plane``, ``rank1``, ``shifted`` or ``shifted=N``, ``group=N``
    (with ``pad=true``), ``block=RxC``, ``flat=N``. The words used are removed from ``words``.
    """
    bare: dict[str, Granularity] = {
        "tensor": PerTensor(),
        "channel": PerChannel(),
        "token": PerToken(),
        "plane": PerPlane(),
        "rank1": Rank1(),
    }
    sized: list[str] = [key for key in ("group", "block", "flat", "shifted") if key in words]
    named = [key for key in bare if key in words]
    if len(sized) + len(named) > 1:
        raise UsageError(f"two granularities in one line: {', '.join(named + sized)}. Keep one.")
    if named:
        words.pop(named[0])
        return bare[named[0]]
    if not sized:
        return None
    key = sized[0]
    text = words.pop(key)
    try:
        if key == "block":
            rows, columns = (int(n) for n in text.lower().split("x"))
            return PerBlock(rows, columns)
        if key == "flat":
            return Flat(int(text))
        if key == "shifted":
            return Shifted(int(text or 0))
        pad = words.pop("pad", "false").lower()
        if pad not in ("true", "false"):
            raise UsageError(f"pad={pad}: say true or false.")
        return PerGroup(int(text), pad == "true")
    except ValueError as error:
        raise UsageError(f"{key}={text} is not a size. Examples: group=32, block=16x16, flat=64.") from error


def _needs_dims(granularity: Granularity, shape: Sequence[int], dims: int) -> None:
    if len(shape) < dims:
        raise GranularityError(
            f"'{granularity}' needs at least {dims} dimension(s); the tensor has shape {tuple(shape)}."
        )
