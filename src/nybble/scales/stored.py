"""Scales before values: of the scales that can be stored near the absmax one, the one that loses least of its block.

A scale in few bits is itself rounded, so its block's largest value lands beside the format's largest anyhow; and E2M1
has nothing between 4 and 6, so a block may lose less when its largest becomes 4. Cook et al. 2025 ("Four Over Six"),
arXiv:2512.02010, try both, ``stored(low=1,high=1.5,grid=2)``, and keep a maximum of 256 for the scales' E4M3 codes
(``inner=256``, or ``scale=absmax(target=256)`` in the scales' own line), so that the largest block has its 1.5 too.
Here all codes between can be tried, below the absmax one as well: in steps of a sixteenth or less none is left out of
E4M3, or of a coarser format. Each is judged as it will be stored, under an outer scale that the search does not move; a
reader can't tell the file from another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from nybble.core.errors import UsageError
from nybble.formats import NumberFormat
from nybble.scales import BlockParams, ScaleRule
from nybble.scales.mse import Mse
from nybble.scales.two_level import divisor_of, not_vanishing

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Stored(ScaleRule):
    """Candidates for the scale.

    Attributes:
        low, high: the smallest and largest, as multiples of the absmax scale, which is a candidate too.
        grid: how many are tried, evenly spaced in the logarithm.
        inner: where it isn't 0, the scale of the scales is kept as a divisor that takes the largest of them to this
            value, as two-level does.
    """

    low: float = 0.75
    high: float = 2.0
    grid: int = 18
    inner: float = 0.0

    judges_stored: ClassVar[Literal["", "nested", "ratios", "always"]] = "always"

    def __post_init__(self) -> None:
        if self.grid < 1 or not 0 < self.low <= self.high:
            raise UsageError(f"{self}: at least one candidate, and 0 < low <= high.")
        if not self.inner >= 0:
            raise UsageError(f"{self}: inner is the largest value of the scales' codes (E4M3: 448), or 0.")

    @property
    def weighs(self) -> bool:  # noqa: D102
        return True

    @property
    def two_level(self) -> bool:  # noqa: D102
        return self.inner > 0

    def fit(
        self,
        blocks: Tensor,
        fmt: NumberFormat,
        rounding: str,
        weight: Tensor | None = None,
        project: Callable[[Tensor, Tensor | None], Tensor] | None = None,
    ) -> BlockParams:
        """As ScaleRule.fit; ``project`` as :attr:`ScaleRule.judges_stored` says, None judges scales as they are."""
        over = divisor_of(blocks.abs().amax(), fmt, self.inner) if self.two_level else None
        fractions = [self.low * (self.high / self.low) ** (i / max(self.grid - 1, 1)) for i in range(self.grid)]
        found = Mse().among(fractions, blocks, fmt, rounding, weight, project, over)
        return found if over is None else replace(found, scale=not_vanishing(found.scale, over, fmt))


PART = Stored
