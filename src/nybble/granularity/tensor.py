"""``tensor``: one scale for all elements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from nybble.granularity._cut import Runs


@dataclass(frozen=True)
class PerTensor(Runs):
    """One scale for all; the granularity of a line that names none."""

    word: ClassVar[str] = "tensor"
    example: ClassVar[str] = "tensor"
    one_scale: ClassVar[bool] = True
    for_convolutions: ClassVar[bool] = True
    calibrated_on: ClassVar[str] = "values"

    def leading(self, shape: Sequence[int]) -> int:  # noqa: D102
        return 0


PART = PerTensor
