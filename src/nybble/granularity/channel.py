"""``channel``: one scale for each index of dimension 0 (output channels of a weight)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from nybble.granularity._cut import Runs, need_dims


@dataclass(frozen=True)
class PerChannel(Runs):
    """One scale for each index of dimension 0."""

    word: ClassVar[str] = "channel"
    example: ClassVar[str] = "channel"
    rows_apart: ClassVar[bool] = True

    def leading(self, shape: Sequence[int]) -> int:  # noqa: D102
        need_dims(self, shape, 1)
        return 1


PART = PerChannel
