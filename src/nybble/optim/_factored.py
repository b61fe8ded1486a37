"""A second moment as the outer product of its rows' and its columns' means.

Shazeer & Stern 2018, arXiv:1804.04235, section 3: the rank-1 matrix nearest to it by the generalized KL divergence.
"""

from __future__ import annotations

import torch
from torch import Tensor


def factor_shapes(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the means over the last dimension, and over the one before it; both are kept with size 1."""
    return (*shape[:-1], 1), (*shape[:-2], 1, shape[-1])


def mean_squares(grad: Tensor, dim: int) -> Tensor:
    """Means of squares over a dimension that is kept, by way of the norm as torch's Adafactor takes them.

    Where that dimension is empty they are 0.
    """
    norms: Tensor = torch.norm(grad, dim=dim, keepdim=True)
    return norms.square_().div_(max(grad.size(dim), 1))


def outer(rows: Tensor, columns: Tensor, least: float) -> Tensor:
    """``rows @ columns / mean(rows)``, of which the mean is at least ``least``."""
    return (rows @ columns).div_(rows.mean(dim=-2, keepdim=True).clamp_(min=least))
