"""How far sums of products of codes can go, proved from the weights; what could overflow is refused."""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.core.errors import SchemeError


def extremes(weights: Tensor, lowest: int, highest: int, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Least and largest value of each row of ``weights @ q + bias``, whatever ``q``, and of any part of the sum.

    Args:
        weights: codes, [out, in], integers.
        lowest: of all inputs' codes; 0 (padding, a sum's start) counts as one.
        highest: of the same.
        bias: [out], integers.

    Returns:
        int64, [out] each. Exact: there are inputs that reach both, unless 0 widened them.
    """
    w = weights.to(torch.int64)
    low, high = min(lowest, 0), max(highest, 0)
    above = torch.maximum(w * low, w * high).sum(1)
    below = torch.minimum(w * low, w * high).sum(1)
    if bias is not None:
        b = bias.to(torch.int64)
        above, below = above + b.clamp(min=0), below + b.clamp(max=0)
    return below, above


def check_fits(low: Tensor, high: Tensor, bits: int, name: str) -> None:
    """Refuse sums that could leave a signed integer.

    Args:
        low: least sums, of :func:`extremes`.
        high: largest sums.
        bits: of the accumulator.
        name: of the layer.

    Raises:
        SchemeError: an input exists with which the sum overflows.
    """
    least, most = int(low.min()), int(high.max())
    if max(most, -least - 1).bit_length() >= bits:
        raise SchemeError(
            f"{name}: its sums can reach {max(most, -least):,}, beyond {bits}-bit accumulators. "
            "Give its weights or inputs fewer bits, or leave the layer out."
        )
