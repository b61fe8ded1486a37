"""Scales (and offsets) of the least weighted squared error, as they will be stored: also scales of scales.

For codes v of a block, ``sum w (x - s v - o)^2`` is quadratic in s and o, so the best ones are solved for; then the
nearest codes are taken again. Blocks begin at the best of several clip values. Where scales are stored in few bits
over a scale of their own (GGUF's K-quants), that one's best value, given all codes below it, is a quotient too: each
block's stored scale and offset, their neighbours, and the outer scales are moved in turn, and each move lowers the
error or is left out.

llama.cpp (``make_qkx3_quants``, ``make_qx_quants`` in ggml-quants.c) solves for the scale and minimum of a block on a
grid of clip values as well, with weights of its own making (importance times ``sqrt(sigma^2 + x^2)``), and rounds them
afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from nybble.core.errors import UsageError
from nybble.formats import NumberFormat
from nybble.scales import BlockParams, ScaleRule, Storage

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LeastSquares(ScaleRule):
    """How long it searches.

    Attributes:
        offset: keep an offset in the units of x; else the scale may be negative.
        grid: clip values tried for a block.
        rounds: over all parts, once they are stored.
    """

    offset: bool = False
    grid: int = 16
    rounds: int = 4

    weighs: ClassVar[bool] = True
    takes_storage: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.grid < 2 or self.rounds < 1:
            raise UsageError(f"{self}: at least two clip values and one round.")

    @property
    def has_offset(self) -> bool:  # noqa: D102
        return self.offset

    def fit(
        self,
        blocks: Tensor,
        fmt: NumberFormat,
        rounding: str,
        weight: Tensor | None = None,
        scales: Storage | None = None,
        offsets: Storage | None = None,
    ) -> BlockParams:
        """As ScaleRule.fit; ``scales`` and ``offsets`` say how they are stored, None judges them as they are."""
        from nybble.scales._squares import solve

        return solve(self, blocks, fmt, rounding, weight, scales or Storage(), offsets or Storage())


PART = LeastSquares
