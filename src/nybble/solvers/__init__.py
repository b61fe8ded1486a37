"""Solvers: a float weight and what calibration saw become a QTensor. One method a file.

A solver gets weights that read the same input together (q, k and v; gate and up), so that one second moment and its
factorisation serve them all. What it minimises is the layer's output error ``tr((W - W_hat) H (W - W_hat)^T)`` with
``H = E[x x^T]``; without calibration, H is the identity and that is the weight error. No solver returns anything worse
than round-to-nearest on it.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from nybble.core.errors import SchemeError, did_you_mean
from nybble.core.registry import Registry
from nybble.qtensor import QTensor
from nybble.quantizer import Quantizer

REGISTRY = Registry("nybble.solvers", "solver")


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A weight to be solved.

    Attributes:
        name: of the module, for messages. matrix: float32 [rows, columns], columns are inputs.
        quantizer: what to round to.
    """

    name: str
    matrix: Tensor
    quantizer: Quantizer


@dataclass(frozen=True, kw_only=True)
class Solved:
    """A solver's answer.

    Attributes:
        weight: the quantized matrix. error: its objective over the objective of zero weights (relative output error).
        rtn_error: the same for round-to-nearest under the same quantizer. notes: fallbacks and choices worth reporting.
    """

    weight: QTensor
    error: float
    rtn_error: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Solver(ABC):
    """A method; its fields are its options in a recipe.

    Attributes:
        needs_second_moment: whether it wants ``H = mean(x x^T)`` of the inputs.
        path: which network the inputs come from: ``float``, or ``quantized`` (blocks before this one are quantized).
    """

    needs_second_moment: ClassVar[bool] = False
    path: ClassVar[str] = "float"

    @abstractmethod
    def solve(self, weights: Sequence[Weight], second_moment: Tensor | None = None) -> list[Solved]:
        """Quantize weights that read the same input.

        Args:
            weights: all with the same number of columns.
            second_moment: float32 [columns, columns], or None where calibration saw nothing (an expert without tokens).
        """

    def working_bytes(self, rows: Sequence[int], columns: int) -> int:
        """Most memory that :meth:`solve` needs for weights [rows, columns] beyond their second moment, in bytes.

        Rounding: the weights in float32, and of the largest about seven copies.
        """
        return 4 * columns * (sum(rows) + 7 * max(rows))

    def quantizer_for(self, quantizer: Quantizer) -> Quantizer:
        """The quantizer that this solver really uses in place of the scheme's (``mse`` changes the scale rule)."""
        return quantizer


def make_solver(name: str, options: Mapping[str, Any]) -> Solver:
    """A solver from a recipe's step.

    Raises:
        UsageError: unknown solver. SchemeError: unknown option, or a value of the wrong type.
    """
    kind: type[Solver] = REGISTRY.get(name)
    known = {f.name: f for f in dataclasses.fields(kind)}
    for key, value in options.items():
        if key not in known:
            raise SchemeError(f"solver {name!r} has no option {key!r}.{did_you_mean(key, known)}")
        default = known[key].default
        number = isinstance(value, int | float) and not isinstance(value, bool) and isinstance(default, float)
        if not number and type(value) is not type(default):
            raise SchemeError(f"solver {name!r}: {key} is a {type(default).__name__}; got {value!r}.")
    return kind(**options)


def relative_error(matrix: Tensor, approximation: Tensor, second_moment: Tensor | None) -> float:
    """``tr(D H D^T) / tr(W H W^T)`` with D = W - W_hat, from float32 products; 0 for a zero weight.

    Args:
        matrix: W, float32 [rows, columns].
        approximation: W_hat, the same.
        second_moment: H, float32 [columns, columns], None for the identity.
    """
    difference = matrix - approximation
    if second_moment is None:
        lost, whole = _total(difference.square_()), _total(matrix.square())
    else:
        lost = _total((difference @ second_moment).mul_(difference))
        whole = _total((matrix @ second_moment).mul_(matrix))
    return 0.0 if whole <= 0 else max(0.0, lost / whole)


def _total(x: Tensor) -> float:
    """Sum over rows in float32, over their sums in float64: no float64 copy of a large matrix."""
    return float(x.sum(1).double().sum())
