"""``flat=N``: one scale for each N neighbours in memory, across rows (QLoRA, optimizer states)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from nybble.granularity import Granularity
from nybble.granularity._cut import cut_rows, join_rows, need_element, whole_numbers

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Flat(Granularity):
    """One scale for each ``size`` neighbours in row-major order; the last block may be short and owns its scale."""

    size: int

    word: ClassVar[str] = "flat"
    example: ClassVar[str] = "flat=24"
    scale_format: ClassVar[str] = "float16"  # many scales: 32 bits each would be seen in the file

    def __post_init__(self) -> None:
        need_element(self.word, self.size, "a block")

    @classmethod
    def parse(cls, value: str, options: Mapping[str, str]) -> Self:  # noqa: D102
        (size,) = whole_numbers(cls.word, value, "flat=64, flat=256")
        return cls(size)

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:  # noqa: D102
        return (-(-math.prod(shape) // self.size),)

    def uneven(self, shape: Sequence[int]) -> bool:  # noqa: D102
        return math.prod(shape) > self.size and math.prod(shape) % self.size > 0

    def to_blocks(self, x: Tensor) -> Tensor:  # noqa: D102
        return cut_rows(x.reshape(-1), self.size)

    def from_blocks(self, blocks: Tensor, shape: Sequence[int]) -> Tensor:  # noqa: D102
        return join_rows(blocks, (math.prod(shape),), self.size).reshape(tuple(shape))

    def __str__(self) -> str:
        return f"flat={self.size}"


PART = Flat
