"""The direction of outputs alone: the negative logarithm of their cosine with the float ones.

    L = mean over tokens of -log(max(cos(y, y_float), 1e-4))

As in PTQ1.61 and others beside the squared error. Tokens whose float output is 0 have no direction and are left out. A
cosine of 0 or less has no logarithm: it counts as 1e-4, without a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from nybble.reconstruction import FLOAT, Reconstruction
from nybble.reconstruction.losses._errors import angle, real_vectors


@dataclass(frozen=True, kw_only=True)
class CosineLog(Reconstruction):
    """The engine's options are its own."""

    def loss(self, output: Tensor, wanted: Mapping[str, Tensor], mask: Tensor | None) -> Tensor:  # noqa: D102
        return angle(*real_vectors(output, wanted[FLOAT], mask))


PART = CosineLog
