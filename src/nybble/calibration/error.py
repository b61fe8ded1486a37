"""The error that solvers minimise and reports state: of a layer's outputs, relative to their power."""

from __future__ import annotations

from torch import Tensor


def relative_error(matrix: Tensor, approximation: Tensor, second_moment: Tensor | None) -> float:
    """``tr(D H D^T) / tr(W H W^T)`` with D = W - W_hat, from float32 products; 0 for a zero weight.

    Args:
        matrix: W, float32 [rows, columns].
        approximation: W_hat, the same.
        second_moment: H, float32 [columns, columns], one for all rows or [groups, columns, columns]; None for the
            identity.
    """
    difference = matrix - approximation
    if second_moment is None:
        lost, whole = _total(difference.square_()), _total(matrix.square())
    else:
        difference, matrix = (by_group(x, second_moment) for x in (difference, matrix))
        lost = _total((difference @ second_moment).mul_(difference))
        whole = _total((matrix @ second_moment).mul_(matrix))
    return 0.0 if whole <= 0 else max(0.0, lost / whole)


def by_group(matrix: Tensor, like: Tensor) -> Tensor:
    """A weight [rows, columns] as [groups, rows / groups, columns] where ``like`` has groups; else as it is."""
    return matrix if like.dim() == 2 else matrix.view(len(like), -1, matrix.shape[1])


def _total(x: Tensor) -> float:
    """Sum over rows in float32, over their sums in float64: no float64 copy of a large matrix."""
    return float(x.sum(-1).double().sum())
