"""``block=RxC``: one scale for each tile of R rows and C columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from nybble.core.errors import GranularityError
from nybble.granularity import Granularity, fitting_sizes
from nybble.granularity._cut import need_dims, whole_numbers

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PerBlock(Granularity):
    """One scale for each ``rows`` x ``columns`` tile of the last two dimensions."""

    rows: int
    columns: int

    word: ClassVar[str] = "block"
    example: ClassVar[str] = "block=4x16"
    scale_format: ClassVar[str] = "float16"  # many scales: 32 bits each would be seen in the file

    def __post_init__(self) -> None:
        if min(self.rows, self.columns) < 1:
            raise GranularityError(f"{self}: a tile needs at least one element.")

    @classmethod
    def parse(cls, value: str, options: Mapping[str, str]) -> Self:  # noqa: D102
        rows, columns = whole_numbers(cls.word, value, "block=16x16, block=1x128", count=2)
        return cls(rows, columns)

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:  # noqa: D102
        need_dims(self, shape, 2)
        *lead, r, c = shape
        for have, size, what in ((r, self.rows, "rows"), (c, self.columns, "columns")):
            if have % size:
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


PART = PerBlock
