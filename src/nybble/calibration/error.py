"""The error that solvers minimise and reports state: of a layer's outputs, relative to their power."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nybble.core.shapes import Float32


@dataclass(frozen=True, kw_only=True)
class Drift:
    """By how much a layer's inputs ``x`` differ from those that it has in the float network, ``d = x_float - x``.

    Attributes:
        power: ``E[d d^T]``, float32 [columns, columns], of a grouped convolution [groups, columns, columns].
        cross: ``E[d x^T]``, the same; with the second moment H of ``x``, ``E[x_float x^T] = H + cross``.
    """

    power: Float32[Tensor, "*groups columns columns"]
    cross: Float32[Tensor, "*groups columns columns"]

    def share(self, alpha: float) -> Drift:
        """From inputs a share of the way to the float network's, ``x + alpha d``."""
        return self if alpha == 1 else Drift(power=alpha**2 * self.power, cross=alpha * self.cross)


def relative_error(
    matrix: Float32[Tensor, "rows columns"],
    approximation: Float32[Tensor, "rows columns"],
    second_moment: Float32[Tensor, "*groups columns columns"] | None,
    drift: Drift | None = None,
) -> float:
    """``tr(D H D^T) / tr(W H W^T)`` with D = W - W_hat, from float32 products; 0 for a zero weight.

    With a drift it is the error against what the float network computes there,
    ``E|W x_float - W_hat x|^2 / E|W x_float|^2``.

    Args:
        matrix: W, float32 [rows, columns].
        approximation: W_hat, the same.
        second_moment: H, float32 [columns, columns], one for all rows or [groups, columns, columns]; None for the
            identity.
        drift: of the inputs; None where the layer is judged on what it gets.
    """
    difference = matrix - approximation
    if second_moment is None:
        lost, whole = _total(difference.square_()), _total(matrix.square())
    else:
        difference, matrix = (by_group(x, second_moment) for x in (difference, matrix))
        lost = _total((difference @ second_moment).mul_(difference))
        whole = _total((matrix @ second_moment).mul_(matrix))
        if drift is not None:
            moved, crossed = _total((matrix @ drift.power).mul_(matrix)), matrix @ drift.cross
            whole += moved + 2 * _total(crossed * matrix)
            lost += moved + 2 * _total(crossed * difference)
    return 0.0 if whole <= 0 else max(lost / whole, 0.0)  # in this order: NaN stays


def by_group(matrix: Tensor, like: Tensor) -> Tensor:
    """A weight [rows, columns] as [groups, rows / groups, columns] where ``like`` has groups; else as it is."""
    return matrix if like.dim() == 2 else matrix.view(len(like), -1, matrix.shape[1])


def input_energy(second_moment: Tensor | None, rows: int) -> Tensor | None:
    """``E x_c^2``: the second moment's diagonal, float32 [1, columns].

    Args:
        second_moment: float32 [columns, columns], or [groups, columns, columns] of a grouped convolution; None gives
            None.
        rows: of the weight. Of groups the result is [rows, columns], each row with its own group's; for one row, their
            mean.
    """
    if second_moment is None:
        return None
    energy = second_moment.diagonal(dim1=-2, dim2=-1)
    if energy.dim() == 1:
        return energy[None]
    return energy.mean(0, keepdim=True) if rows == 1 else energy.repeat_interleave(rows // len(energy), 0)


def _total(x: Tensor) -> float:
    """Sum over rows in float32, over their sums in float64: no float64 copy of a large matrix."""
    return float(x.sum(-1).double().sum())
