"""Solvers: a float weight and what calibration saw become a QTensor. One method a file.

A solver gets weights that read the same input together (q, k and v; gate and up), so that one second moment and its
factorisation serve them all. What it minimises is the layer's output error ``tr((W - W_hat) H (W - W_hat)^T)`` with
``H = E[x x^T]``; without calibration, H is the identity and that is the weight error. A solver may also choose the
quantizer of the input, and the formats (LLM-FP4). No solver returns anything worse than round-to-nearest on its
objective.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from nybble.calibration.error import Drift
from nybble.core.registry import Registry
from nybble.core.shapes import Float, Float32
from nybble.qtensor import QTensor, QuantParams
from nybble.qtensor.vector import VectorQuantizer
from nybble.quantizer import Quantizer
from nybble.recipe import ROOMS

REGISTRY = Registry(*ROOMS["solver"], lambda part: isinstance(part, type) and issubclass(part, Solver))
Operand = tuple[Quantizer, QuantParams]


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A weight to be solved.

    Attributes:
        name: of the module, for messages. matrix: float32 [rows, columns], columns are inputs.
        quantizer: what to round to.
    """

    name: str
    matrix: Float32[Tensor, "rows columns"]
    quantizer: Quantizer


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large each channel of an input is, before any quantizer: its ``largest`` and its ``mean`` magnitude."""

    largest: Float32[Tensor, " columns"]
    mean: Float32[Tensor, " columns"]


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What calibration saw of the input that some weights share; what a solver doesn't need is None.

    Attributes:
        second_moment: ``E[x x^T]`` of the inputs as the layer will get them (quantized, where the scheme says how),
            float32 [columns, columns], of a grouped convolution [groups, columns, columns]; None where calibration saw
            nothing (an expert without tokens).
        guided: second moments for groups of neighbouring rows, tokens weighed by what these rows' outputs mean to the
            model's loss, by the weight's name: float32 [groups, columns, columns]; missing where gradients and inputs
            can't be paired.
        drift: how those inputs differ from the float network's; None where tokens of both can't be paired (experts).
        sizes: of the channels of those inputs; None as for ``second_moment``.
        inputs: the inputs themselves before any quantizer, [tokens, columns] or [groups, tokens, columns], in the
            model's dtype.
        fisher: squared gradients of the loss by the layer's outputs, by the weight's name: float32 [tokens, rows].
        quantizer: what the scheme says about the inputs; None leaves them in float.
    """

    second_moment: Float32[Tensor, "*groups columns columns"] | None = None
    guided: Mapping[str, Float32[Tensor, "_groups columns columns"]] = field(default_factory=dict)
    drift: Drift | None = None
    sizes: Sizes | None = None
    inputs: Float[Tensor, "*groups tokens columns"] | None = None
    fisher: Mapping[str, Float32[Tensor, "tokens _rows"]] = field(default_factory=dict)
    quantizer: Quantizer | None = None


@dataclass(frozen=True, kw_only=True)
class Solved:
    """A solver's answer.

    Attributes:
        weight: the quantized matrix. error: its objective over the objective of zero weights (relative output error).
        rtn_error: the same for round-to-nearest under the same quantizer. notes: fallbacks and choices worth reporting.
        quantizer: what the weight was rounded to, where that isn't the scheme's (a chosen format).
        stored: what the weight is where no Quantizer can say it: a code book of vectors, or a line for parts in
            different quantizers.
        inputs: quantizer and parameters of the input, where the solver chose them.
        clip: largest representable value over the largest magnitude, a value a row, where the solver searched it.
    """

    weight: QTensor
    error: float
    rtn_error: float
    notes: tuple[str, ...] = ()
    quantizer: Quantizer | None = None
    stored: VectorQuantizer | str = ""
    inputs: tuple[Quantizer, QuantParams] | None = None
    clip: Float32[Tensor, " rows"] | None = None


@dataclass(frozen=True, kw_only=True)
class Solver(ABC):
    """A method; its fields are its options in a recipe.

    Attributes:
        path: which network the inputs come from: ``float``, or ``quantized`` (blocks before this one are quantized).
    """

    path: ClassVar[str] = "float"

    @property
    def vectors(self) -> VectorQuantizer | None:
        """The code book of vectors that weights get; None: codes with scales."""
        return None

    @property
    def paths(self) -> frozenset[str]:
        """The networks that must be run beside each other for what it needs: ``drift`` compares both."""
        return frozenset({self.path})

    def needs(self, inputs: Quantizer | None) -> frozenset[str]:
        """What :meth:`solve` reads, for inputs under this quantizer.

        Any of ``second_moment``, ``drift`` (of the quantized path's, with both :attr:`paths`), ``guided`` (in
        :attr:`guides` groups), ``sizes``, ``inputs``, ``fisher``.
        """
        return frozenset()

    @property
    def guides(self) -> int:
        """How many groups of rows it wants second moments of that gradients weigh; 0: none."""
        return 0

    @property
    def chooses_inputs(self) -> bool:
        """Whether it finds the parameters of static input quantizers itself."""
        return False

    def trial(self) -> Solver:
        """The same method with its smallest search, to find out what it takes."""
        return self

    @property
    def most_tokens(self) -> int:
        """How many inputs it wants at most, of those that calibration has."""
        return 0

    @abstractmethod
    def solve(self, weights: Sequence[Weight], stats: Stats) -> list[Solved]:
        """Quantize weights that read the same input.

        Args:
            weights: all with the same number of columns.
            stats: what calibration saw of that input.
        """

    def solve_product(
        self,
        left: Float32[Tensor, "products n columns"],
        right: Float32[Tensor, "products m columns"],
        quantizer: Quantizer,
    ) -> tuple[Operand, Operand]:
        """Parameters for both operands of ``left @ right^T``, two activations; here each from its own values.

        Args:
            left: float32 [products, n, columns].
            right: float32 [products, m, columns].
            quantizer: a static one for both.
        """
        return (quantizer, quantizer.fit(left)), (quantizer, quantizer.fit(right))

    def working_bytes(self, rows: Sequence[int], columns: int) -> int:
        """Most memory that :meth:`solve` needs for weights [rows, columns] beyond what it is given, in bytes.

        Rounding: the weights in float32, and of the largest about seven copies.
        """
        return 4 * columns * (sum(rows) + 7 * max(rows))

    def flops(self, rows: int, columns: int, tokens: int, inputs: Quantizer | None) -> float:
        """Multiply-adds x 2 of a search for one weight, for an estimate of time; 0 for what takes no search."""
        return 0.0

    def check_shape(self, rows: int, columns: int) -> None:  # noqa: B027  (most methods take every shape)
        """Raise GranularityError for a weight of a shape that the method can't take, whatever its quantizer."""

    def stored_bytes(self, quantizer: Quantizer, shape: tuple[int, int]) -> float:
        """Bytes of one such weight in the file: codes, scales, offsets."""
        return self.quantizer_for(quantizer).stored_bytes(shape)

    def quantizer_for(self, quantizer: Quantizer) -> Quantizer:
        """The quantizer that this solver really uses in place of the scheme's (``mse`` changes the scale rule)."""
        return quantizer


def make_solver(name: str, options: Mapping[str, Any]) -> Solver:
    """A solver from a recipe's step.

    Raises:
        UsageError: unknown solver. SchemeError: unknown option, or a value of the wrong type.
    """
    made: Solver = REGISTRY.make(name, options)
    return made
