"""The squared error of a window's outputs over the power of the float ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from nybble.reconstruction import FLOAT, Reconstruction
from nybble.reconstruction.losses._errors import real_rows, relative


@dataclass(frozen=True, kw_only=True)
class Mse(Reconstruction):
    """``|y - y_float|^2 / |y_float|^2`` over all real rows of a batch; the engine's options are its own."""

    def loss(self, output: Tensor, wanted: Mapping[str, Tensor], mask: Tensor | None) -> Tensor:  # noqa: D102
        return relative(*real_rows(output, wanted[FLOAT], mask))


PART = Mse
