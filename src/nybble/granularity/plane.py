"""``plane``: one scale for each channel of each image, or of each signal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from nybble.granularity._cut import Runs, need_dims


@dataclass(frozen=True)
class PerPlane(Runs):
    """One scale for each index of the first two dimensions: a channel of an image, or of a signal.

    Vectors [images, width] have one scale each, so that a line serves a convolutional network and its classifier.
    """

    word: ClassVar[str] = "plane"
    example: ClassVar[str] = "plane"
    for_convolutions: ClassVar[bool] = True

    def leading(self, shape: Sequence[int]) -> int:  # noqa: D102
        need_dims(self, shape, 2)
        return 2 if len(shape) > 2 else 1


PART = PerPlane
