"""Orthogonal matrices that a gradient moves: a descent on them, and a map onto them for any other optimizer.

    G = dL/dR,  V = momentum V + G,  W = V R^T - R V^T            skew-symmetric: the direction in which R may turn
    R' = (I + a/2 W)^-1 (I - a/2 W) R                             the Cayley transform: R' is orthogonal, too

Li, Fuxin, Todorovic 2020, "Efficient Riemannian Optimization on the Stiefel Manifold via the Cayley Transform",
arXiv:2002.01113, with SpinQuant's cut of the step (Liu et al. 2024, arXiv:2405.16406, section 3.2): a is the rate, or
1 / |W| (Frobenius) where that is smaller. Where we differ: the inverse is calculated in float64 and not by a few rounds
of a fixed point, and momentum stays a gradient, so that R never leaves the manifold and is never brought back to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ROUNDS = 16


class CayleyDescent:
    """Moves orthogonal matrices against their gradients.

    Args:
        matrices: float32 leaves [count, n, n] with gradients; each of the ``count`` is orthogonal, and moves by itself.
        momentum: share of the direction before that is kept, 0 or more and below 1.
    """

    def __init__(self, matrices: Sequence[Tensor], momentum: float = 0.0) -> None:
        self.matrices, self.momentum = tuple(matrices), momentum
        self._exact = [matrix.detach().double() for matrix in self.matrices]
        self._direction = [torch.zeros_like(matrix) for matrix in self._exact]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One step; gradients are used and forgotten."""
        for number, matrix in enumerate(self.matrices):
            if matrix.grad is None:
                continue
            exact = self._exact[number]
            direction = self._direction[number].mul_(self.momentum).add_(matrix.grad.double())
            turn = direction @ exact.mT - exact @ direction.mT
            size = turn.square().sum((-2, -1), keepdim=True).sqrt()
            half = turn * (torch.clamp(1 / size.clamp_min(1e-30), max=rate) / 2)
            one = torch.eye(exact.shape[-1], dtype=exact.dtype, device=exact.device)
            exact.copy_(torch.linalg.solve(one + half, exact - half @ exact))
            matrix.copy_(exact)
            matrix.grad = None


def turned(skew: Tensor) -> Tensor:
    """The orthogonal matrix nearest to ``I + A``: float32 [..., n, n] of a skew-symmetric A of the same shape.

    It turns the plane of each pair of A's eigenvalues +-ia by atan(a): every rotation by less than a quarter has its A,
    as in Cayley's map (which turns by 2 atan(a / 2)). By the iteration X' = 1.5 X - 0.5 X X^T X of Newton and Schulz:
    products alone, so that a GPU can record it; its fixed number of rounds is enough for |A| (Frobenius) up to 100.
    """
    one = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    x = one + skew
    x = x / x.square().sum((-2, -1), keepdim=True).sqrt()
    for _ in range(_ROUNDS):
        x = 1.5 * x - 0.5 * (x @ x.mT @ x)
    return x


def block_diagonal(parts: Tensor) -> Tensor:
    """Square matrices [..., count, n, n] along the diagonal of one, [..., count n, count n]; differentiable."""
    *front, count, size, _ = parts.shape
    one = torch.eye(count, dtype=parts.dtype, device=parts.device)
    return (parts[..., :, :, None, :] * one[:, None, :, None]).reshape(*front, count * size, count * size)


def orthogonality_error(matrices: Tensor) -> float:
    """Largest magnitude in ``R R^T - I``."""
    one = torch.eye(matrices.shape[-1], dtype=torch.float64, device=matrices.device)
    wide = matrices.detach().double()
    return float((wide @ wide.mT - one).abs().max())
