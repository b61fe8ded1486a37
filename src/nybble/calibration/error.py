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
    return RelativeError(matrix, second_moment, drift).of(approximation)


class RelativeError:
    """:func:`relative_error` of several approximations of one weight, whose own power is measured once.

    Args:
        matrix: as there; second_moment, drift, too.
    """

    def __init__(self, matrix: Tensor, second_moment: Tensor | None, drift: Drift | None = None) -> None:
        self.matrix, self.second_moment, self.drift = matrix, second_moment, drift
        self._crossed: Tensor | None = None
        self._moved = 0.0
        if second_moment is None:
            self._whole = _total(matrix.square())
            return
        grouped = by_group(matrix, second_moment)
        self._whole = _total((grouped @ second_moment).mul_(grouped))
        if drift is not None:
            self._moved, self._crossed = _total((grouped @ drift.power).mul_(grouped)), grouped @ drift.cross
            self._whole += self._moved + 2 * _total(self._crossed * grouped)

    def of(self, approximation: Tensor) -> float:
        """Float32 [rows, columns]."""
        difference = self.matrix - approximation
        if self.second_moment is None:
            lost = _total(difference.square_())
        else:
            difference = by_group(difference, self.second_moment)
            lost = _total((difference @ self.second_moment).mul_(difference))
            if self._crossed is not None:
                lost += self._moved + 2 * _total(self._crossed * difference)
        return 0.0 if self._whole <= 0 else max(lost / self._whole, 0.0)  # in this order: NaN stays


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
