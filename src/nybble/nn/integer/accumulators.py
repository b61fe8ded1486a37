"""How far sums of products of codes can go, proved from the weights; what could overflow is refused."""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.core.errors import SchemeError


def extremes(weights: Tensor, lowest: int, highest: int, bias: Tensor | None = None) -> tuple[int, int]:
    """Least and largest value of ``weights @ q + bias`` over all inputs, and of any part of the sum in any order.

    Args:
        weights: codes, [out, in], integers.
        lowest: of the inputs' codes; 0 (padding, a sum's start) counts as one.
        highest: of the same.
        bias: [out], integers.

    Returns:
        Exact: there are inputs that reach both, unless 0 widened them.
    """
    w = weights.to(torch.int64)
    low, high = min(lowest, 0), max(highest, 0)
    above = torch.maximum(w * low, w * high).sum(1)
    below = torch.minimum(w * low, w * high).sum(1)
    if bias is not None:
        b = bias.to(torch.int64)
        above, below = above + b.clamp(min=0), below + b.clamp(max=0)
    return int(below.min()), int(above.max())


def check_fits(found: tuple[int, int], bits: int, name: str) -> None:
    """Refuse sums that could leave a signed integer.

    Args:
        found: least and largest sum, of :func:`extremes`.
        bits: of the accumulator.
        name: of the layer.

    Raises:
        SchemeError: an input exists with which the sum overflows.
    """
    most = max(found[1], -found[0] - 1)
    if most.bit_length() >= bits:
        raise SchemeError(
            f"{name}: sums of its products can reach {max(found[1], -found[0]):,}, beyond {bits}-bit accumulators. "
            "Give its weights or inputs fewer bits, or leave the layer out."
        )
