"""A power of two: OCP MX v1.0 and the other rules in use.

``mode`` is that of :func:`nybble.ops.scaling.pow2_scale`: floor (the specification's and ggml's), ceil, even
(compressed-tensors'), rceil (ModelOpt's, and ZeroQuant-FP's constraint M1), rfloor, nearest (MLX's); or ``search``: of
the specification's scale and twice that, which loses less of each block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from nybble.core.arithmetic import POW2_MODES
from nybble.core.errors import UsageError
from nybble.formats import NumberFormat
from nybble.rounding import get_rounding
from nybble.scales import BlockParams, ScaleRule

if TYPE_CHECKING:
    from torch import Tensor

SEARCH = "search"


@dataclass(frozen=True)
class Pow2(ScaleRule):
    """``mode``: floor (the specification's), ceil, even, rceil, rfloor, nearest, or search."""

    mode: str = "floor"

    scale_format: ClassVar[str] = "bfloat16"  # holds every power of two that float32 does

    def __post_init__(self) -> None:
        if self.mode not in (*POW2_MODES, SEARCH):
            raise UsageError(f"pow2(mode={self.mode}): the modes are {', '.join((*POW2_MODES, SEARCH))}.")

    @property
    def of_maximum(self) -> bool:
        """Whether the largest magnitude of a block decides its scale."""
        return self.mode != SEARCH

    def fit(self, blocks: Tensor, fmt: NumberFormat, rounding: str, weight: Tensor | None = None) -> BlockParams:  # noqa: D102
        import torch

        from nybble.ops.rounding import round_to
        from nybble.ops.scaling import pow2_scale

        amax = blocks.abs().amax(1, keepdim=True)
        if self.of_maximum:
            return BlockParams(pow2_scale(amax, fmt, self.mode))
        low = pow2_scale(amax, fmt, "floor")
        high = (2 * low).clamp(max=2.0**127)
        name = "nearest-even" if get_rounding(rounding).stochastic else rounding

        def lost(scale: Tensor) -> Tensor:
            error: Tensor = (round_to(blocks / scale, fmt.name, name) - blocks / scale) * (scale / low)
            return (error.square() if weight is None else error.square() * weight).sum(1, keepdim=True)

        return BlockParams(torch.where(lost(high) < lost(low), high, low))

    def allowed(self, scale: Tensor) -> Tensor:
        """The nearest powers of two, in the logarithm."""
        import torch

        result: Tensor = torch.exp2(scale.log2().round())
        return result


PART = Pow2
