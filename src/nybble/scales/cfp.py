"""Outliers are cut off where they stand apart from all others: coarse-to-fine pre-processing of weights.

Ding et al. 2023 (CBQ), arXiv:2312.07950. Coarse: candidates are the magnitudes above T = Q3 + lambda1 (Q3 - Q1), with
the quartiles of all. Fine: the candidates, sorted, are split where

    M = (smallest outlier - largest reserved)^2 - lambda2 Var(reserved candidates)

is largest. The paper truncates the weights to the largest reserved magnitude and then finds the scales; here the scales
are those of the truncated blocks and the rest saturates: the same codes, and the float network stays what it was. The
cut is one for all blocks of a tensor. Where there are no candidates nothing changes. (All candidates may be outliers:
then the largest reserved magnitude is the largest below T. It is never 0.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nybble.core.arithmetic import divided
from nybble.core.errors import UsageError
from nybble.formats import NumberFormat
from nybble.scales import BlockParams, ScaleRule
from nybble.scales.minmax import ends, fit_range

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Cfp(ScaleRule):
    """Options of the method.

    Attributes:
        coarse: lambda1. fine: lambda2.
        asymmetric: the range around an integer zero point.
        offset: any range, with a real offset.
    """

    coarse: float = 1.5
    fine: float = 1.0
    asymmetric: bool = False
    offset: bool = False

    def __post_init__(self) -> None:
        check_lambdas(self.coarse, self.fine)
        if self.asymmetric and self.offset:
            raise UsageError("cfp(asymmetric=true,offset=true): a range has an integer zero point or a real offset.")

    @property
    def needs_integer(self) -> bool:  # noqa: D102
        return self.asymmetric

    @property
    def has_offset(self) -> bool:  # noqa: D102
        return self.offset

    def fit(self, blocks: Tensor, fmt: NumberFormat, rounding: str, weight: Tensor | None = None) -> BlockParams:  # noqa: D102
        import torch

        magnitudes = blocks.abs()
        if weight is None or blocks.is_meta:  # of the latter only sizes are asked for
            real = magnitudes.flatten()
        else:
            real = magnitudes[weight.expand_as(blocks) > 0]
        cut = largest_reserved(real, self.coarse, self.fine)
        if self.offset:
            low, high = ends(blocks, weight)
            some = (low < cut) & (high > -cut)  # a block beyond the cut altogether is what its offset is for
            low, high = (torch.where(some, end.clamp(-cut, cut), end) for end in (low, high))
            return fit_range(low, high, fmt, offset=True)
        if self.asymmetric:
            low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
            return fit_range(torch.maximum(low, -cut), torch.minimum(high, cut), fmt, offset=False)
        return BlockParams(divided(torch.minimum(magnitudes.amax(1, keepdim=True), cut), fmt.absmax))


def check_lambdas(coarse: float, fine: float) -> None:
    """Raise UsageError where the method's weights are none."""
    if coarse < 0 or fine < 0:
        raise UsageError(f"cfp(coarse={coarse:g},fine={fine:g}): both are weights, 0 or more.")


def largest_reserved(magnitudes: Tensor, coarse: float, fine: float) -> Tensor:
    """The largest magnitude that is no outlier: float32, no dimensions; infinite where there are no outliers.

    Args:
        magnitudes: float32, >= 0, any shape; what isn't finite takes no part.
        coarse: lambda1.
        fine: lambda2.
    """
    import torch

    none = magnitudes.new_full((), torch.inf)
    if magnitudes.is_meta:
        return none  # only sizes are asked for
    ordered = magnitudes[magnitudes.isfinite()].double().sort().values
    if len(ordered) < 2:
        return none
    at = torch.tensor([0.25, 0.75], dtype=torch.float64, device=ordered.device) * (len(ordered) - 1)
    below, above = ordered[at.floor().long()], ordered[at.ceil().long()]
    low, high = (below + (above - below) * (at - at.floor())).unbind()
    first = int((ordered <= high + coarse * (high - low)).sum())
    if first == len(ordered):
        return none
    reserved = ordered[max(first - 1, 0) : -1]  # in front of each candidate
    candidates = ordered[first:]
    kept = torch.arange(len(candidates), dtype=torch.float64, device=ordered.device)
    about = candidates - candidates[0]  # a variance doesn't change, and digits are kept
    before = torch.cat([about.new_zeros(1), about[:-1]])
    mean, square = (before.pow(power).cumsum(0) / kept.clamp(min=1) for power in (1, 2))
    apart = (candidates - reserved).square() - fine * (square - mean.square())
    apart = torch.where(reserved > 0, apart, -torch.inf)
    return none if bool(apart.amax().isneginf()) else reserved[apart.argmax()].float()


PART = Cfp
