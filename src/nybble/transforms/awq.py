"""AWQ: channels with large inputs get a larger share of the weights' grid, as much as lowers the output error.

Lin et al. 2023, arXiv:2306.00978, eq. 4 and 5: ``s = mean|x|^alpha`` for each input channel, normalised by
``sqrt(max s  min s)``; weights are multiplied by s and inputs, in the norm or linear layer before them, divided. Of
``grid`` values of alpha from 0 up that one is taken which minimises

    sum over the weights behind of  tr(D H D^T),   D = Q(W diag(s)) diag(s)^-1 - W,   H = E[x x^T]

with Q the rounding to nearest under the scheme's quantizer: the output error of the layers that read the channels. (The
paper's code judges q, k and v by their attention's output and gate and up by the MLP's, from a sample of tokens; H says
it for all tokens at once.) No rewriting at all is always a candidate, so that error never rises.

The paper's second part, clipping, is a search for scales and comes with the solver: ``rtn`` with ``scale: mse(...)``
and ``weighted: true``. Inputs are looked at in float: for a scheme that rounds them too, ``smooth`` weighs both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nybble.core.errors import SchemeError
from nybble.models.adapter import LinearFold, NormFold
from nybble.quantizer import Quantizer
from nybble.transforms._folds import Channel, Scaling, safe_factor

LEAST = 1e-4  # the smallest factor before it is normalised, as in the paper's code


@dataclass(frozen=True, kw_only=True)
class Awq(Scaling):
    """Options of the method.

    Attributes:
        grid: values of alpha that are tried: 0, 1 / grid, ... below 1.
        duo: divide by ``mean(|w| / max|w| of its block)^(1 - alpha)`` too, as the code of its successors does.
        linear: also between two linear layers (v to o, up to down).
    """

    moments: ClassVar[bool] = True

    grid: int = 20
    duo: bool = False
    linear: bool = True

    def __post_init__(self) -> None:
        if self.grid < 1:
            raise SchemeError(f"awq: grid={self.grid}; at least one value of alpha.")

    def takes(self, fold: NormFold | LinearFold) -> bool:  # noqa: D102
        return isinstance(fold, NormFold) or self.linear

    def factor(self, channel: Channel) -> Tensor:  # noqa: D102
        best = torch.ones_like(channel.largest)
        weights = [(w, q) for w, q in zip(channel.behind, channel.quantizers, strict=True) if q is not None]
        if not weights or channel.mean is None or channel.moment is None:
            return best
        small = _small(weights) if self.duo else None
        least = output_error(weights, best, channel.moment)
        for step in range(self.grid):
            candidate = scales(channel.mean, small, step / self.grid)
            error = output_error(weights, channel.taken(candidate), channel.moment)
            if error < least:
                best, least = candidate, error
        return best

    def working_bytes(self, shapes: Sequence[tuple[int, int]]) -> int:
        """Second moments of all inputs, of which three may be of one width; four copies of the largest weight."""
        widths = [columns for _, columns in shapes]
        moments = sum(4 * c * c * min(3, widths.count(c)) for c in set(widths))
        return moments + 16 * max((rows * columns for rows, columns in shapes), default=0)

    def flops(self, rows: int, columns: int, tokens: int) -> float:
        """A forward, the second moment, and for each alpha a rounding and a product with it."""
        tries = self.grid + 1
        return 2.0 * tokens * rows * columns + tokens * columns**2 + tries * rows * columns * (2.0 * columns + 20)


def scales(mean: Tensor, small: Tensor | None, alpha: float) -> Tensor:
    """Normalised factors; channels that are never used keep 1.

    Args:
        mean: mean magnitude of the inputs, float32 [channels].
        small: mean magnitude of the weights in units of their blocks' largest, or None.
        alpha: share of the inputs' size.
    """
    alive = mean > 0
    found = mean**alpha if small is None else mean**alpha / (small ** (1 - alpha) + LEAST)
    found = found.clamp(min=LEAST)
    if not bool(alive.any()):
        return torch.ones_like(mean)
    found = found / (found[alive].max() * found[alive].min()).sqrt()
    return safe_factor(found, alive)


def output_error(weights: Sequence[tuple[Tensor, Quantizer]], factor: Tensor, moment: Tensor) -> float:
    """``sum tr(D H D^T)`` of weights that are multiplied by ``factor``, rounded, and divided by it.

    Args:
        weights: float32 [rows, channels], of fused experts [experts, rows, channels], and what they are rounded to.
        factor: float32 [channels].
        moment: H, float32 [channels, channels].
    """
    total = 0.0
    for matrices, quantizer in weights:
        for matrix in matrices.unbind(0) if matrices.dim() == 3 else (matrices,):
            lost = quantizer.fake_quantize(matrix * factor).div_(factor).sub_(matrix)
            total += float((lost @ moment).mul_(lost).sum(-1).double().sum())
    return total


def _small(weights: Sequence[tuple[Tensor, Quantizer]]) -> Tensor:
    """``mean(|w| / max|w| of its block)`` over all rows that read a channel, float32 [channels]."""
    found = []
    for matrices, quantizer in weights:
        view = quantizer.granularity
        for matrix in matrices.unbind(0) if matrices.dim() == 3 else (matrices,):
            blocks = view.to_blocks(matrix.abs())
            found.append(view.from_blocks(blocks / (blocks.amax(1, keepdim=True) + 1e-6), tuple(matrix.shape)))
    return torch.cat(found).mean(0)


PART = Awq
