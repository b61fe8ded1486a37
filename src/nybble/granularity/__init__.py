"""Who shares a scale: the view of a tensor as ``[blocks, elements]`` and back; one granularity a file.

Formats, roundings and scale rules see only blocks, and nothing above this folder asks for a granularity's class: what
differs between them is a method or an attribute of :class:`Granularity`.

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

A new one is a file here, or an entry point of the group ``nybble.granularity`` in another package; its name is the word
of a quantizer line, and ``PART`` is a subclass of :class:`Granularity`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol, Self

from nybble.core.errors import GranularityError, UsageError
from nybble.core.registry import Registry
from nybble.core.shapes import Bool, Float, Float32, Shaped

if TYPE_CHECKING:
    import torch
    from torch import Tensor

REGISTRY = Registry(
    "nybble.granularity", "granularity", lambda part: isinstance(part, type) and issubclass(part, Granularity)
)


class Grid(Protocol):
    """What factors need to know of a number format."""

    @property
    def name(self) -> str:
        """As in a quantizer line."""

    @property
    def absmax(self) -> float:
        """Largest magnitude."""

    @property
    def exponent_bits(self) -> int | None:
        """Width of the exponent, where there is one."""

    @property
    def has_zero(self) -> bool:
        """Whether 0 is one of its values; where it isn't, what is 0 needs a scale of 0."""


class Granularity(ABC):
    """A partition of a tensor's elements into blocks that share one scale; every element is in exactly one.

    A part is a frozen dataclass: hashable, and ``str`` of it is its spelling, which files keep.

    Attributes:
        word: its word in a quantizer line; the part's key.
        example: a spelling that fits a matrix [8, 32], for tables and tests.
        options: other words of the line that belong to it (``pad`` to ``group``).
        scale_format: what its scales and offsets are stored in where a line doesn't say.
        one_scale: whether the whole tensor has one scale, whatever its shape.
        rows_apart: whether every block lies in one row of a matrix, so that a search may treat each row by itself.
            False is always right: such a search then moves all scales together.
        for_convolutions: whether inputs of a convolution may have it: each scale covers all pixels of the channels that
            it covers, since one value meets many positions of the kernel.
        for_products: whether operands of a product of two activations may have it. Not where its columns have factors
            that a weight must take up.
        calibrated_on: what static calibration fits it to: ``values``, some of all values in any order; ``columns``, the
            largest magnitude of each column; empty where values measured once can't serve tensors of every shape.
        combine: how factors make its scale, ``product`` or ``min``: then :meth:`fit_factors` finds them, of maxima, and
            no other scale rule. Empty: the scale rule finds one scale a block.
        factors_are: what the factors are, for messages.
        stored: what a file keeps of calibrated factors beside ``scale``, by name: dtype of one value a column, by name.
    """

    word: ClassVar[str]
    example: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ()
    scale_format: ClassVar[str] = "float32"
    one_scale: ClassVar[bool] = False
    rows_apart: ClassVar[bool] = False
    for_convolutions: ClassVar[bool] = False
    for_products: ClassVar[bool] = True
    calibrated_on: ClassVar[str] = ""
    combine: ClassVar[str] = ""
    factors_are: ClassVar[str] = ""
    stored: ClassVar[Mapping[str, str]] = {}

    # ------------------------------------------------------------------------------------------------ spelling
    @classmethod
    def parse(cls, value: str, options: Mapping[str, str]) -> Self:
        """From a quantizer line.

        Args:
            value: what stands behind ``word=``; empty for the word alone.
            options: those of its :attr:`options` that the line has.

        Raises:
            UsageError: a value that it can't have.
        """
        if value not in ("", "true"):
            raise UsageError(f"'{cls.word}' takes no value; got {cls.word}={value}.")
        return cls()

    def __str__(self) -> str:
        """The spelling that :meth:`parse` reads."""
        return self.word

    # ------------------------------------------------------------------------------------------------ blocks
    @abstractmethod
    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the scale of a tensor of ``shape``; its product is the number of blocks.

        Raises:
            GranularityError: such a tensor can't be cut; the message has sizes that fit.
        """

    @abstractmethod
    def to_blocks(self, x: Shaped[Tensor, " ..."]) -> Shaped[Tensor, "blocks elements"]:
        """View (a copy where memory order demands it) of ``x`` as ``[blocks, elements]``; short blocks end in zeros.

        A factored scale meets them as :meth:`factor_blocks` says, so there may be more blocks than scales.
        """

    @abstractmethod
    def from_blocks(self, blocks: Shaped[Tensor, "blocks elements"], shape: Sequence[int]) -> Tensor:
        """Inverse of :meth:`to_blocks`: ``[blocks, elements]`` back to ``shape``."""

    def mask(self, shape: Sequence[int], device: torch.device | None = None) -> Bool[Tensor, "blocks elements"] | None:
        """``[blocks, elements]``, true on real elements; None where no block is padded."""
        import torch

        padded = math.prod(self.scale_shape(shape)) and self.to_blocks(torch.empty(shape, device="meta")).numel()
        if padded == math.prod(shape):
            return None
        return self.to_blocks(torch.ones(tuple(shape), dtype=torch.float32, device=device)) > 0

    def expand(self, scale: Tensor, shape: Sequence[int]) -> Tensor:
        """One value a block (``scale_shape(shape)``) as a tensor that broadcasts against ``shape``."""
        import torch

        elements = self.to_blocks(torch.empty(shape, device="meta")).shape[1]
        return self.from_blocks(scale.reshape(-1, 1).expand(-1, elements), shape)

    def check(self, shape: Sequence[int]) -> None:
        """Raise GranularityError when a tensor of ``shape`` can't be cut; the message has sizes that fit."""
        self.scale_shape(shape)

    def fitted(self, shape: Sequence[int]) -> Granularity:
        """The plainest granularity that cuts a tensor of ``shape``, which it can cut, into the same blocks."""
        return self

    def uneven(self, shape: Sequence[int]) -> bool:
        """Whether some blocks of a tensor of ``shape`` are shorter than others."""
        return False

    # ------------------------------------------------------------------------------------------------ factored scales
    @property
    def factored(self) -> bool:
        """Whether the scale is made of factors."""
        return bool(self.combine)

    @property
    def searchable(self) -> bool:
        """Whether clip values can be searched: a scale rule's can; factors where fitting takes fractions."""
        return not self.factored

    def check_format(self, fmt: Grid) -> None:  # noqa: B027  (most take any)
        """Raise SchemeError for a format that its factors can't go with."""

    def summary(self, x: Tensor) -> Tensor:
        """A tensor (smaller, if possible) that has the factors of ``x`` up to their number of dimensions."""
        return x

    def fit_factors(
        self, x: Float32[Tensor, "*shape"], fmt: Grid, fraction: Float32[Tensor, " 1"] | None = None
    ) -> tuple[Float32[Tensor, "*#shape"], ...]:
        """The factors of a tensor; there are none unless :attr:`factored`.

        Args:
            x: float32, not empty; or a :meth:`summary`.
            fmt: format of the elements.
            fraction: float32 [1], of the unclipped range (only where :attr:`searchable`).

        Returns:
            float32, each broadcasting against ``x``.
        """
        raise GranularityError(f"'{self}' has one scale a block, not factors.")

    def factor_blocks(self, scale: Float[Tensor, " ..."], shape: Sequence[int]) -> Float[Tensor, "blocks elements"]:
        """A factored scale, expanded so that it broadcasts against ``shape``, as it broadcasts against the blocks."""
        return self.to_blocks(scale.expand(tuple(shape)))

    def store(self, factors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Calibrated factors as a file keeps them: ``scale``, float32 [1], and [columns] for each of :attr:`stored`."""
        raise GranularityError(f"'{self}' keeps no calibrated factors.")

    def restore(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The inverse of :meth:`store`."""
        raise GranularityError(f"'{self}' keeps no calibrated factors.")


def get_granularity(name: str) -> type[Granularity]:
    """The granularity whose word is ``name``.

    Raises:
        UsageError: there is none, or a plug-in spells it otherwise than it is registered.
    """
    part: type[Granularity] = REGISTRY.get(name)
    if part.word != name.replace("_", "-"):
        raise UsageError(f"the granularity registered as {name!r} is spelled {part.word!r}; both must be the same.")
    return part


def granularity_words() -> list[str]:
    """Every word that names a granularity, and those that only go with one."""
    parts = REGISTRY.all()
    return [*parts, *(option for part in parts.values() for option in part.options)]


def parse_granularity(words: dict[str, str]) -> Granularity | None:
    """Take a granularity out of the words of a quantizer line, or None when it names none.

    The words used are removed from ``words``.

    Raises:
        UsageError: two granularities, or a value that one can't have.
    """
    named = [word for word in words if word in REGISTRY]
    if len(named) > 1:
        raise UsageError(f"two granularities in one line: {', '.join(named)}. Keep one.")
    if not named:
        return None
    part = get_granularity(named[0])
    value = words.pop(named[0])
    return part.parse(value, {option: words.pop(option) for option in part.options if option in words})


def make_granularity(text: str) -> Granularity:
    """A granularity from its spelling: ``group=32 pad=true``, the inverse of ``str``.

    Raises:
        UsageError: it is none, or has words that aren't its own.
    """
    words = {key: value for key, _, value in (word.partition("=") for word in text.split())}
    found = parse_granularity(words)
    if found is None or words:
        raise UsageError(f"unknown granularity {text!r}.")
    return found


def fitting_sizes(count: int, smallest: int = 8, most: int = 8) -> str:
    """Divisors of ``count`` worth offering as a group size, as text: multiples of 16 first if there are any."""
    low = [d for d in range(1, math.isqrt(min(count, 1 << 40)) + 1) if count % d == 0]
    every = sorted({*low, *(count // d for d in low)})
    divisors = [d for d in every if d >= smallest] or every
    even = [d for d in divisors if d % 16 == 0]
    return ", ".join(str(d) for d in (even or divisors)[:most])
