"""The signed extreme goes to the format's most negative value, so the scale may be negative.

GGUF Q4_0: d = extreme / -8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nybble.core.arithmetic import divided
from nybble.core.errors import FormatError
from nybble.formats import NumberFormat
from nybble.scales import BlockParams, ScaleRule

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Extreme(ScaleRule):
    """The larger side is exact, the other clips by up to one step."""

    def fit(self, blocks: Tensor, fmt: NumberFormat, rounding: str, weight: Tensor | None = None) -> BlockParams:  # noqa: D102
        if not fmt.signed:
            raise FormatError(f"scale=extreme maps the extreme to the most negative value; {fmt.name} has none.")
        where = blocks.abs().argmax(1, keepdim=True)
        return BlockParams(divided(blocks.gather(1, where), fmt.min))


PART = Extreme
