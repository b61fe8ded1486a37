"""Orthogonal matrices that a gradient moves: a descent on them, and a map onto them for any other optimizer.

    G = dL/dR,  W = G R^T - R G^T                      skew-symmetric: the direction in which R may turn
    M = mean of the W so far,  v = mean of |W|^2       exponential, without the bias towards their start at 0
    R' = (I + a/2 A)^-1 (I - a/2 A) R,  A = M sqrt(n / v)       the Cayley transform: R' is orthogonal, too

Li, Fuxin, Todorovic 2020, "Efficient Riemannian Optimization on the Stiefel Manifold via the Cayley Transform",
arXiv:2002.01113: Cayley ADAM, with one second moment a matrix. Gradients through rounding agree little from one batch
to the next (a cosine of 0.1), and how long they are is another thing in every network: SpinQuant's SGD, whose steps
have the length rate |W| or 1, whichever is less, walks at random wherever gradients are long. Here ``a`` is an angle
for any of them: channels turn by it in a step (root mean square) where all gradients agree, by less where they don't.
Where we differ: the inverse is calculated in float64 and not by a few rounds of a fixed point, moments are those of
W and not of G, and the length is in angles of a channel, so that it means the same for all n.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ROUNDS = 16
_SQUARES = 0.99
"""Share of the second moments before that is kept."""


class CayleyDescent:
    """Moves orthogonal matrices against their gradients.

    Args:
        matrices: float32 leaves [count, n, n] with gradients; each of the ``count`` is orthogonal, and moves by itself.
        momentum: share of the directions before that is kept, 0 or more and below 1.
    """

    def __init__(self, matrices: Sequence[Tensor], momentum: float = 0.9) -> None:
        self.matrices, self.momentum = tuple(matrices), momentum
        self._exact = [matrix.detach().double() for matrix in self.matrices]
        self._mean = [torch.zeros_like(matrix) for matrix in self._exact]
        self._square = [matrix.new_zeros(matrix.shape[0], 1, 1) for matrix in self._exact]
        self._steps = [0] * len(self.matrices)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One step of up to ``rate`` radians; gradients are used and forgotten."""
        for number, matrix in enumerate(self.matrices):
            if matrix.grad is None:
                continue
            exact, gradient = self._exact[number], matrix.grad.double()
            turn = gradient @ exact.mT - exact @ gradient.mT
            half = self._direction(number, turn) * (rate / 2)
            one = torch.eye(exact.shape[-1], dtype=exact.dtype, device=exact.device)
            exact.copy_(torch.linalg.solve(one + half, exact - half @ exact))
            matrix.copy_(exact)
            matrix.grad = None

    def _direction(self, number: int, turn: Tensor) -> Tensor:
        """Skew-symmetric, of Frobenius norm sqrt(n) where all turns so far were the same."""
        self._steps[number] += 1
        mean = self._mean[number].lerp_(turn, 1 - self.momentum)
        square = self._square[number].lerp_(turn.square().sum((-2, -1), keepdim=True), 1 - _SQUARES)
        grown = 1 - self.momentum ** self._steps[number]
        size = (square / (1 - _SQUARES ** self._steps[number])).sqrt().clamp_min(1e-30)
        found: Tensor = mean * (turn.shape[-1] ** 0.5 / grown / size)
        return found


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
