"""The output error of linear layers that share an input, as quadratic forms of the weights or of the inputs.

With e = x - Q(x) and d = Q(w) - w, a layer's output is off by ``x.w - Q(x).Q(w) = e.w - Q(x).d``, so of one output

    E (e.w - Q(x).d)^2 = w E[e e^T] w - 2 w E[e Q(x)^T] d + d E[Q(x) Q(x)^T] d                     (inputs fixed)

costs a candidate one product of its weights with a [columns, columns] matrix; the first term is the same for all of
them, and left out. With the weights fixed, and
r = x.(w - Q(w)), v = (sum over outputs) r Q(w),

    E sum (r + e.Q(w))^2 = E sum r^2 + 2 E e.v + E e (Q(W)^T Q(W)) e^T                            (weights fixed)

No candidate runs the layer. Differences, not squares of whole outputs, keep float32 accurate.

``importance`` (Fisher information) weighs the squared error of every token and output. With the weights fixed that is
exact; with the inputs fixed each output would have a second moment of its own, so there the weight is the token's mean
over the outputs: ``g[t, k] ~ mean_k g[t, k]`` up to a factor of k, which no output's own choice depends on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nybble.calibration.error import by_group
from nybble.core.matmul import fast_products


class InputsFixed:
    """The error of each output as a function of its rounded weights.

    Args:
        second: ``E[Q(x) Q(x)^T]``, float32 [columns, columns], or one for each group of rows; None for the identity.
        cross: ``E[e Q(x)^T]``; None where inputs stay as they are.
    """

    def __init__(self, second: Tensor | None, cross: Tensor | None = None) -> None:
        self.second, self.cross = second, cross

    @staticmethod
    def of_inputs(x: Tensor, rounded: Tensor | None, importance: Tensor | None = None) -> InputsFixed:
        """From the inputs.

        Args:
            x: inputs as they are, float32 [tokens, columns] or [groups, tokens, columns].
            rounded: inputs as the layer gets them, the same; None if that is ``x``.
            importance: float32 [tokens, 1], or None.
        """

        def mean(left: Tensor, right: Tensor) -> Tensor:
            return ((left if importance is None else left * importance).mT @ right).div_(x.shape[-2])

        with fast_products(x.device):
            if rounded is None:
                return InputsFixed(mean(x, x))
            error = x - rounded
            return InputsFixed(mean(rounded, rounded), mean(error, rounded))

    def of(self, matrix: Tensor) -> Callable[[Tensor], Tensor]:
        """For weights [rows, columns], the function: rounded weights -> error of each row, float32 [rows].

        Where inputs are rounded too, less what their rounding loses with exact weights: it may be negative.
        """
        matrix = matrix if self.second is None else by_group(matrix, self.second)
        linear = None if self.cross is None else matrix @ self.cross

        def error(rounded: Tensor) -> Tensor:
            difference = rounded.view(matrix.shape) - matrix
            if self.second is None:
                return difference.square_().sum(-1)
            with fast_products(matrix.device):
                product = difference @ self.second
            if linear is not None:
                product = product - 2 * linear
            return (product * difference).sum(-1).flatten()

        return error


class WeightsFixed:
    """The error of all outputs together as a function of the rounded inputs.

    Args:
        x: inputs as they are, float32 [tokens, columns]; of several products (or groups) at once [products, tokens,
            columns].
        matrix: weights (or the other operand), float32 [rows, columns] or [products, rows, columns], each row scaled by
            how much its error counts.
        rounded: the same, rounded.
        importance: float32 [tokens, rows], or None.
    """

    def __init__(self, x: Tensor, matrix: Tensor, rounded: Tensor, importance: Tensor | None = None) -> None:
        self.x, self.rounded, self.importance = x, rounded, importance
        lost = matrix - rounded
        with fast_products(x.device):
            if importance is not None:
                self.fixed = x @ lost.mT
                return
            self.linear = 2 * (x @ (lost.mT @ rounded))
            self.constant = ((lost.mT @ lost) * (x.mT @ x)).sum() / x.shape[:-1].numel()
            rows, columns = matrix.shape[-2:]
            self.form = rounded.mT @ rounded if rows > columns else None

    def __call__(self, inputs: Tensor) -> Tensor:
        """Rounded inputs -> mean over tokens of the squared error of all outputs, float32 [1]."""
        error = self.x - inputs.view(self.x.shape)
        with fast_products(self.x.device):
            if self.importance is not None:
                output = self.fixed + error @ self.rounded.mT
                return (output.square_() * self.importance).sum(-1).mean().reshape(1)
            if self.form is not None:
                total = ((error @ self.form).add_(self.linear) * error).sum(-1)
            else:
                total = (error @ self.rounded.mT).square_().sum(-1) + (self.linear * error).sum(-1)
        return (total.mean() + self.constant).reshape(1)


def output_error(
    x: Tensor, inputs: Tensor | None, matrix: Tensor, rounded: Tensor, importance: Tensor | None = None
) -> float:
    """The error as it is defined, by running the layer in float32: what is reported, and what fallbacks compare."""
    given = x if inputs is None else inputs
    matrix, rounded = by_group(matrix, x), by_group(rounded, x)
    lost = torch.zeros((), dtype=torch.float64, device=x.device)
    tokens = x.shape[-2]
    for start in range(0, tokens, 4096):
        rows = slice(start, start + 4096)
        error = (x[..., rows, :] @ matrix.mT).sub_(given[..., rows, :] @ rounded.mT).square_()
        lost += (error if importance is None else error.mul_(importance[rows])).sum(-1).double().sum()
    return float(lost / tokens)
