"""A power of two: OCP MX v1.0 and the other rules in use.

``mode`` is floor, ceil, even or rceil, see :func:`nybble.ops.scaling.pow2_scale`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nybble.core.errors import UsageError
from nybble.formats import NumberFormat
from nybble.ops.scaling import POW2_MODES, pow2_scale
from nybble.scales import BlockParams, ScaleRule


@dataclass(frozen=True)
class Pow2(ScaleRule):
    """``mode``: floor (the specification's), ceil, even or rceil."""

    mode: str = "floor"

    scale_format: ClassVar[str] = "bfloat16"  # holds every power of two that float32 does

    def __post_init__(self) -> None:
        if self.mode not in POW2_MODES:
            raise UsageError(f"pow2(mode={self.mode}): the modes are {', '.join(POW2_MODES)}.")

    def fit(self, blocks: Tensor, fmt: NumberFormat, rounding: str, weight: Tensor | None = None) -> BlockParams:  # noqa: D102
        return BlockParams(pow2_scale(blocks.abs().amax(1, keepdim=True), fmt, self.mode))


PART = Pow2
