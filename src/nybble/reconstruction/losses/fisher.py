"""The squared error, weighted by how much the model's likelihood depends on each output: the Fisher diagonal.

    L = sum(g^2 (y - y_float)^2) / sum(g^2 y_float^2),     g the gradient of the log likelihood by y_float

Li et al. 2021, "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction", arXiv:2102.05426, eq.
10. One pass of the whole float model over the calibration data gathers g (:mod:`nybble.calibration.fisher`: labels are
drawn from the model itself, where BRECQ takes the gradient of its task's loss).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from nybble.reconstruction import FISHER, FLOAT, Reconstruction
from nybble.reconstruction.losses._errors import real_rows


@dataclass(frozen=True, kw_only=True)
class Fisher(Reconstruction):
    """The engine's options are its own."""

    targets = (FLOAT, FISHER)

    def loss(self, output: Tensor, wanted: Mapping[str, Tensor], mask: Tensor | None) -> Tensor:  # noqa: D102
        given, goal = real_rows(output, wanted[FLOAT], mask)
        weight, _ = real_rows(wanted[FISHER], wanted[FISHER], mask)
        weight = weight / weight.mean().clamp(min=1e-38)  # squares of small gradients, squared values: nothing is lost
        return (weight * (given - goal).square()).sum() / (weight * goal.square()).sum().clamp(min=1e-20)


PART = Fisher
