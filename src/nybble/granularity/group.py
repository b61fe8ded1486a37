"""``group=N``: one scale for each N neighbours in the last dimension; ``pad=true`` lets the last group be short."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from nybble.core.errors import GranularityError, UsageError
from nybble.granularity import Granularity, fitting_sizes
from nybble.granularity._cut import cut_rows, join_rows, need_dims, need_element, whole_numbers

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PerGroup(Granularity):
    """One scale for each ``size`` neighbours of the last dimension.

    Args:
        size: elements of a group; must divide the last dimension, unless it is padded.
        pad: the last group of each row may be short (it owns its scale; no padding element is stored).
    """

    size: int
    pad: bool = False

    word: ClassVar[str] = "group"
    example: ClassVar[str] = "group=16"
    scale_format: ClassVar[str] = "float16"  # many scales: 32 bits each would be seen in the file
    options: ClassVar[tuple[str, ...]] = ("pad",)
    rows_apart: ClassVar[bool] = True

    def __post_init__(self) -> None:
        need_element(self.word, self.size, "a group")

    @classmethod
    def parse(cls, value: str, options: Mapping[str, str]) -> Self:  # noqa: D102
        (size,) = whole_numbers(cls.word, value, "group=32, group=48 pad=true")
        pad = options.get("pad", "false").lower() or "true"  # the word alone means yes
        if pad not in ("true", "false"):
            raise UsageError(f"pad={pad}: say true or false.")
        return cls(size, pad == "true")

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:  # noqa: D102
        need_dims(self, shape, 1)
        columns = shape[-1]
        if columns % self.size and not self.pad:
            raise GranularityError(
                f"{columns} columns, and group={self.size} does not divide them. Sizes that do: "
                f"{fitting_sizes(columns)}. Or 'pad=true' for a shorter last group, or 'channel' for one scale a row."
            )
        return (*shape[:-1], -(-columns // self.size))

    def fitted(self, shape: Sequence[int]) -> Granularity:
        """Without padding where no group is short; one group of all columns where there are fewer than it has."""
        columns = shape[-1]
        return self if not self.pad or not columns or self.uneven(shape) else PerGroup(min(self.size, columns))

    def uneven(self, shape: Sequence[int]) -> bool:  # noqa: D102
        return shape[-1] > self.size and shape[-1] % self.size > 0

    def to_blocks(self, x: Tensor) -> Tensor:  # noqa: D102
        self.scale_shape(x.shape)
        return cut_rows(x, self.size)

    def from_blocks(self, blocks: Tensor, shape: Sequence[int]) -> Tensor:  # noqa: D102
        return join_rows(blocks, shape, self.size)

    def __str__(self) -> str:
        return f"group={self.size}" + (" pad=true" if self.pad else "")


PART = PerGroup
