"""Losses of one sample: calculated in float32, the gradient rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.microcontroller.arithmetic import exp32, log32

LOSSES = ("cross_entropy", "mse", "l1", "berhu")
BERHU = float.fromhex("0x1.99999ap-3")
"""Of the largest error: above it berHu is a parabola. Source: Laina et al. 2016, arXiv:1606.00373."""


def loss_and_gradient(kind: str, y: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient by ``y``.

    Args:
        kind: one of :data:`LOSSES`. Cross-entropy is that of logits with the shares of classes; the others are means.
        y: ``[n]``, of the 16-bit type.
        target: ``[n]``, float32; shares of classes, or values.

    Returns:
        ``[]`` float32, and ``[n]`` of ``y``'s dtype.
    """
    wide = y.float()
    if kind == "cross_entropy":
        loss, gradient = _cross_entropy(wide, target)
    else:
        loss, gradient = _regression(kind, wide, target)
    return loss, gradient.to(y.dtype)


def _cross_entropy(y: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    highest = y.max()
    powers = exp32(y - highest)
    total = _in_order(powers)
    whole = log32(total) + highest
    return _in_order(target * (whole - y)), powers / total - target


def _regression(kind: str, y: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    count = torch.tensor(float(len(y)), dtype=torch.float32)
    error = y - target
    size = error.abs()
    sign = torch.where(error < 0, -torch.ones_like(error), torch.ones_like(error))  # +1 where both are equal
    if kind == "mse":
        return _in_order(error * error) / count, error * (2.0 / count)
    if kind == "l1":
        return _in_order(size) / count, sign / count
    bound = size.max() * BERHU
    steep = torch.where(size > bound, (error * error + bound * bound) / (bound + bound), size)
    slope = torch.where(size > bound, error / bound, sign)
    return _in_order(steep) / count, slope / count


def _in_order(x: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float32)
    for one in x:
        total = total + one
    return total
