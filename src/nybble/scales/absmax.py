"""The largest magnitude of the block goes to the format's largest: ``scale = max|x| / target``.

For ``int4`` (-7 .. 7) the target is 7, for ``int4_full`` 8 ("full range", clips one side by half a step);
compressed-tensors divides symmetric INT4 by 7.5: ``int4_full scale=absmax(target=7.5)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nybble.core.arithmetic import divided
from nybble.core.errors import UsageError
from nybble.formats import NumberFormat
from nybble.scales import BlockParams, ScaleRule

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AbsMax(ScaleRule):
    """``target``: value that the largest magnitude is mapped to; 0 means the format's largest."""

    target: float = 0.0

    def __post_init__(self) -> None:
        if not self.target >= 0:
            raise UsageError(
                f"absmax(target={self.target}): the target is positive (or 0 for the format's largest value)."
            )

    def fit(self, blocks: Tensor, fmt: NumberFormat, rounding: str, weight: Tensor | None = None) -> BlockParams:  # noqa: D102
        return BlockParams(divided(blocks.abs().amax(1, keepdim=True), self.target or fmt.absmax))


PART = AbsMax
