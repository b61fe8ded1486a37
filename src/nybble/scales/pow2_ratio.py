"""Scales whose ratios are powers of two, so that 4-bit floats become 8-bit ones by a shift of the exponent alone.

Wu et al. 2023 (ZeroQuant-FP), arXiv:2307.09782, constraint M2: with S_max the largest of the scales that share one
real number, S_i' = S_max / 2^ceil(log2(S_max / S_i)). That number is applied behind the product; what the product
reads is q 2^-k, exactly a value of E4M3 for k <= 8 and of E5M2 for k <= 15
(:meth:`nybble.qtensor.block.BlockQTensor.cast`). Which scales share one, and how far they may differ, is what the
scales' own line says; ``(ufloat3_e3m0_finite channel floor=normal)``, the default, keeps k <= 6 in three bits and one
number a row, and smaller blocks take the smallest scale; ``(ufloat3_e3m0_finite group=4 floor=normal)`` gives every
four scales of a row a number of their own. (M1, where every scale is a power of two by itself, is
``pow2(mode=rceil)``.)

Published is ``down``, whose scales clip the largest values of most blocks. Of Student's t weights (5 degrees of
freedom, E2M1, groups of 256) it loses 0.027 of the square, ``up`` 0.023, ``nearest`` 0.020, real scales 0.018: so
``nearest`` is the default. ``search`` takes the power of two that loses least of each block (weighted, where a solver
knows the inputs' energy), as ``stored`` does under the same scale_format.

What M2 leaves free is the row's number. S_max is one choice among all between it and 2 S_max (beyond, the powers come
round again), and no better than another: under it the largest block alone has the scale that it wants. ``phases=8``
tries eight of them, evenly spaced in the logarithm, and keeps for every row the one under which its blocks lose least.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from nybble.core.arithmetic import divided
from nybble.core.errors import FormatError, SchemeError, UsageError
from nybble.formats import NumberFormat
from nybble.scales import BlockParams, ScaleRule
from nybble.scales.mse import Mse

if TYPE_CHECKING:
    from torch import Tensor

SEARCH = "search"


@dataclass(frozen=True)
class Pow2Ratio(ScaleRule):
    """Which power of two, under which number.

    Attributes:
        mode: nearest in the logarithm, down (as published: what is above the largest saturates), up, or search:
            of the nearest one, its double, its half and its quarter, what loses least.
        phases: how many numbers are tried for those that share one.
    """

    mode: str = "nearest"
    phases: int = 1

    scale_format: ClassVar[str] = "(ufloat3_e3m0_finite channel floor=normal)"
    judges_stored: ClassVar[Literal["", "nested", "ratios", "always"]] = "ratios"

    def __post_init__(self) -> None:
        if self.mode not in ("down", "up", "nearest", SEARCH):
            raise UsageError(f"pow2-ratio(mode={self.mode}): the modes are down, up, nearest and search.")
        if not 1 <= self.phases <= 64:
            raise UsageError(f"pow2-ratio(phases={self.phases}): from 1, which is S_max alone, to 64.")

    @property
    def weighs(self) -> bool:  # noqa: D102
        return self.mode == SEARCH or self.phases > 1

    def check_scales(self, fmt: NumberFormat | None) -> None:  # noqa: D102
        powers = np.zeros(0) if fmt is None else fmt.grid[fmt.grid > 0]
        if len(powers) < 2 or not np.array_equal(powers[1:], 2 * powers[:-1]):
            raise SchemeError(
                f"scale={self} finds scales for a quantizer line of their own, in a format of powers of two; "
                f"{'a plain dtype' if fmt is None else fmt.name} is none. Leave scale_format out, or say "
                f"scale_format={self.scale_format}."
            )

    def fit(
        self,
        blocks: Tensor,
        fmt: NumberFormat,
        rounding: str,
        weight: Tensor | None = None,
        project: Callable[[Tensor, Tensor | None], Tensor] | None = None,
    ) -> BlockParams:
        """As ScaleRule.fit; ``project`` as :attr:`ScaleRule.judges_stored` says, None leaves the scales as they are."""
        import torch

        if not fmt.has_zero:
            raise FormatError(f"scale={self}: {fmt.name} has no zero, and no scale here stands for a block of zeros.")
        scale = divided(blocks.abs().amax(1, keepdim=True), fmt.absmax)
        if project is None:
            return BlockParams(scale)
        if self.mode == SEARCH:
            return Mse().among([0.25, 0.5, 2.0], blocks, fmt, rounding, weight, project)
        near = project(scale, None)
        below = torch.where(near <= scale, near, project(near / 2, None))
        above = torch.where(near >= scale, near, project(near * 2, None))
        if self.mode == "nearest":
            # of the wider ratio: scale / below or above / scale
            return BlockParams(torch.where(scale.double().square() < below.double() * above.double(), below, above))
        return BlockParams(below if self.mode == "down" else above)


PART = Pow2Ratio
