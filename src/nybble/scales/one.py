"""No scaling: the format's own values (E8M0 scales, float16 offsets)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nybble.formats import NumberFormat
from nybble.scales import BlockParams, ScaleRule

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class One(ScaleRule):
    """Scale 1 for every block; it is not stored."""

    def fit(self, blocks: Tensor, fmt: NumberFormat, rounding: str, weight: Tensor | None = None) -> BlockParams:  # noqa: D102
        import torch

        return BlockParams(torch.ones(blocks.shape[0], 1, dtype=torch.float32, device=blocks.device))


PART = One
