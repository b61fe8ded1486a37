"""The squared error of a window's outputs over the power of the float ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nybble.reconstruction import Reconstruction


@dataclass(frozen=True, kw_only=True)
class Mse(Reconstruction):
    """``|y - y_float|^2 / |y_float|^2`` over all real rows of a batch; the engine's options are its own."""

    def loss(self, output: Tensor, wanted: Tensor, mask: Tensor | None) -> Tensor:  # noqa: D102
        output, wanted = output.float(), wanted.float()
        if mask is not None and output.shape[:2] == mask.shape:
            output, wanted = output[mask], wanted[mask]
        return (output - wanted).square().sum() / wanted.square().sum().clamp(min=1e-20)


PART = Mse
