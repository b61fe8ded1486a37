"""``token``: one scale for each row of the last dimension."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from nybble.granularity._cut import Runs, need_dims


@dataclass(frozen=True)
class PerToken(Runs):
    """One scale for each row of the last dimension."""

    word: ClassVar[str] = "token"
    example: ClassVar[str] = "token"
    rows_apart: ClassVar[bool] = True

    def leading(self, shape: Sequence[int]) -> int:  # noqa: D102
        need_dims(self, shape, 1)
        return len(shape) - 1


PART = PerToken
