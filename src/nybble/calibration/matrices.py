"""A block's weights as matrices by the names of a fold, and rewrites: functions that give new weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from nybble.calibration.block import BlockState
from nybble.learned.transforms import Function
from nybble.nn.kinds import matrix_at, values_at


@dataclass(frozen=True, kw_only=True)
class Rewrite:
    """Weights that change together.

    Attributes:
        weights: names of the parameters that are read, relative to the block; any of them may change.
        parameters: what the change depends on beside the weights.
        function: (weights, parameters) -> the weights that changed, float32; differentiable in both.
    """

    weights: tuple[str, ...]
    parameters: Mapping[str, Tensor]
    function: Function

    def apply(self, state: BlockState) -> None:
        """Rewrite a block."""
        found = self.function({name: state.get(name) for name in self.weights}, self.parameters)
        for name, value in found.items():
            state.put(name, value)


class Matrices:
    """A block's weights as matrices [rows, columns] (of fused experts [experts, rows, columns]), by a fold's names."""

    def __init__(self, state: BlockState) -> None:
        self.state = state

    def parameters(self, name: str) -> tuple[str, ...]:
        """The parameters that a matrix is made of."""
        asked: list[str] = []

        def get(full: str) -> Tensor:
            asked.append(full)
            return self.state.raw(full)

        matrix_at(self.state.module, name, get)
        return tuple(asked)

    def bias(self, name: str) -> str | None:
        """The name of a module's bias, if it has one."""
        return f"{name}.bias" if self.state.has(f"{name}.bias") else None

    def get(self, name: str, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """The matrix now, or as ``weights`` have its parameters; float32."""
        return matrix_at(self.state.module, name, self.state.get if weights is None else weights.__getitem__)

    def put(self, name: str, matrix: Tensor) -> dict[str, Tensor]:
        """What its parameters must hold for the matrix to be this one."""
        return values_at(self.state.module, name, matrix)
