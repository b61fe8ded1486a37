"""Two targets for one output: what the float network gives, and what float blocks give for the inputs there really are.

    L = accumulated E(T(W, X), T(W_q, X_q)) + local E(T(W, X_q), T(W_q, X_q))

CBQ's homologous reconstruction (Ding et al. 2023, arXiv:2312.07950): the first term corrects what the blocks before
have lost, the second is the window's own error. OmniQuant's ``aug_loss`` is the same with E the squared error.
PTQ1.61's (Zhao et al. 2025, arXiv:2502.13179) adds to that the negative logarithm of the cosine, a mean over tokens,
with weight 1. There the squared error is over the target's power: the published code's own would outweigh the angle, or
vanish beside it, as the hidden states of a model are large or small; and the code's absolute value of the cosine would
reward outputs that point the other way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from nybble.core.errors import SchemeError
from nybble.reconstruction import FLOAT, LOCAL, Reconstruction
from nybble.reconstruction.losses._errors import angle, distance_and_divergence, real_rows, real_vectors, relative


@dataclass(frozen=True, kw_only=True)
class TwoTarget(Reconstruction):
    """Options beside the engine's.

    Attributes:
        error: E: ``mse``, the squared error over the target's power, ``l2-kl``, CBQ's, or ``mse-cosine``, PTQ1.61's.
        accumulated: weight of the error to what the float network gives. local: of the error to what the float blocks
            give for the quantized path's inputs.
    """

    error: Literal["mse", "l2-kl", "mse-cosine"] = "mse"
    accumulated: float = 1.0
    local: float = 1.0

    targets = (FLOAT, LOCAL)

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.accumulated, self.local) < 0 or self.accumulated + self.local == 0:
            raise SchemeError(
                f"two-target: accumulated={self.accumulated:g}, local={self.local:g}: weights are 0 or more, and one "
                "of them is more."
            )
        if self.feed != "quantized":
            raise SchemeError("two-target has one target only where feed=float: both would be the same; use mse.")

    def loss(self, output: Tensor, wanted: Mapping[str, Tensor], mask: Tensor | None) -> Tensor:  # noqa: D102
        return sum(
            (weight * self._error(output, wanted[name], mask) for name, weight in self._weights() if weight),
            output.new_zeros((), dtype=output.float().dtype),
        )

    def _weights(self) -> tuple[tuple[str, float], ...]:
        return (FLOAT, self.accumulated), (LOCAL, self.local)

    def _error(self, output: Tensor, wanted: Tensor, mask: Tensor | None) -> Tensor:
        if self.error == "mse":
            return relative(*real_rows(output, wanted, mask))
        vectors = real_vectors(output, wanted, mask)
        if self.error == "mse-cosine":
            return relative(*vectors) + angle(*vectors)
        return distance_and_divergence(*vectors)


PART = TwoTarget
