"""Largest Hessian eigenvalue x squared error of the weights (HAWQ, Dong et al. 2019, arXiv:1905.03696, equation 5).

``Omega_i(b) = lambda_i * ||Q_b(W_i) - W_i||^2``, lambda by power iteration: the Rayleigh quotient of a unit vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from nybble.core.options import at_least_one
from nybble.core.seeds import generator
from nybble.search.curvature import Curvature, dot, of_layers
from nybble.search.sensitivities import Sensitivity, squared_changes
from nybble.search.study import Layer, Study


@dataclass(frozen=True, kw_only=True)
class HessianTop(Sensitivity):
    """The eigenvalue is the one of the largest magnitude; a negative one, away from a minimum, counts by its magnitude.

    Attributes:
        iterations: at most. tolerance: the relative change of the eigenvalue at which it stops.
    """

    iterations: int = 100
    tolerance: float = 1e-3
    differentiates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        at_least_one(iterations=self.iterations)

    def measure(self, study: Study) -> Tensor:  # noqa: D102
        return squared_changes(study, [abs(value) for value in self.eigenvalues(study)])

    def sharpness(self, study: Study) -> list[float]:
        """Magnitudes: HAWQ's ``S_i``, once each is divided by its layer's number of weights."""
        return [abs(value) for value in self.eigenvalues(study)]

    def eigenvalues(self, study: Study) -> list[float]:
        """Of each layer's block of the Hessian of the mean loss, with their signs."""
        key = f"eigenvalue {self.iterations} {self.tolerance}"
        return of_layers(study, "eigenvalues of the Hessian", key, partial(self._eigenvalue, study.seed))

    def _eigenvalue(self, seed: int, curvature: Curvature, layer: Layer) -> float:
        vector = curvature.vector(layer, generator(seed, "eigenvalue", layer.name), signs=False)
        value = 0.0
        for number in range(self.iterations):
            norm = float(dot(vector, vector).sqrt())
            if norm == 0:  # a block without curvature
                return 0.0
            vector = [each / norm for each in vector]
            product = curvature.product(layer, vector)
            before, value = value, float(dot(product, vector))
            if number and abs(value - before) < self.tolerance * (abs(before) + 1e-6):
                break
            vector = product
        return value


PART = HessianTop
