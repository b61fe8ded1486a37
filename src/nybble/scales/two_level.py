"""NVFP4 as compressed-tensors calculates it: one stored divisor for the tensor, E4M3 scales below it.

    divisor = 448 * 6 / max|x|          scale = E4M3(divisor * (amax / 6))          x_hat = scale / divisor * value

The plain nested form (``nvfp4``) multiplies by max|x| / 2688 instead of dividing by its reciprocal; the two differ in
last bits, and so in a few codes. A scale that E4M3 would round to 0 becomes 0.125, an overflowing divisor 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from nybble.core.arithmetic import divided
from nybble.core.errors import UsageError
from nybble.formats import NumberFormat
from nybble.scales import BlockParams, ScaleRule

if TYPE_CHECKING:
    from torch import Tensor

_VANISHES = 2.0**-10  # E4M3's smallest subnormal is 2^-9; a tie goes to the even code, 0
_INSTEAD = 0.125


@dataclass(frozen=True)
class TwoLevel(ScaleRule):
    """``inner``: largest value of the scales' format."""

    inner: float = 448.0

    takes_divisor: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.inner > 0:
            raise UsageError(
                f"two-level(inner={self.inner:g}): the largest value of the scales' format is positive (E4M3: 448)."
            )

    @property
    def two_level(self) -> bool:  # noqa: D102
        return True

    def fit(self, blocks: Tensor, fmt: NumberFormat, rounding: str, weight: Tensor | None = None) -> BlockParams:  # noqa: D102
        return self.under(blocks, fmt, self.divisor(blocks, fmt))

    def divisor(self, x: Tensor, fmt: NumberFormat) -> Tensor:
        """The divisor for a tensor, or for all that are like it."""
        return divisor_of(x.abs().max(), fmt, self.inner)

    def under(self, blocks: Tensor, fmt: NumberFormat, divisor: Tensor) -> BlockParams:
        """As :meth:`fit`, under a divisor that is known: of inputs, a calibrated one."""
        amax = blocks.abs().amax(1, keepdim=True)
        return BlockParams(not_vanishing(divided(amax, fmt.absmax), divisor, fmt), over=divisor)


def divisor_of(amax: Tensor, fmt: NumberFormat, inner: float) -> Tensor:
    """The reciprocal of the scale of the scales: ``inner * absmax / amax``, of the tensor's largest magnitude."""
    import torch

    divisor = inner * fmt.absmax / amax
    return torch.where(divisor.isinf(), torch.ones_like(divisor), divisor)


def not_vanishing(scale: Tensor, divisor: Tensor, fmt: NumberFormat) -> Tensor:
    """``scale`` [blocks, 1], but where E4M3 would round it to 0 what compressed-tensors puts there."""
    import torch

    vanishes = scale * divisor <= _VANISHES
    if not fmt.has_zero:
        vanishes &= scale != 0
    return torch.where(vanishes, _INSTEAD / divisor, scale)


PART = TwoLevel
