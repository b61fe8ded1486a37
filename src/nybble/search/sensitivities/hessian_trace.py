"""Mean Hessian eigenvalue x squared error of the weights (HAWQ-V2, Dong et al. 2020, arXiv:1911.03852, section 3).

``Omega_i(b) = Tr(H_i) / n_i * ||Q_b(W_i) - W_i||^2``. The trace is Hutchinson's: the mean of ``z^T H_i z`` over vectors
of random signs, exact after one where ``H_i`` is diagonal.
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
class HessianTrace(Sensitivity):
    """A negative trace, away from a minimum, counts as 0: no format may gain from losing more.

    Attributes:
        probes: vectors a layer, at most. tolerance: it stops where one changes the mean by less than this part.
    """

    probes: int = 50
    tolerance: float = 1e-3
    differentiates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        at_least_one(probes=self.probes)

    def measure(self, study: Study) -> Tensor:  # noqa: D102
        traces = self.traces(study)
        sizes = [study.matrices(layer).numel() for layer in study.layers]
        return squared_changes(study, [max(0.0, trace) / size for trace, size in zip(traces, sizes, strict=True)])

    def sharpness(self, study: Study) -> list[float]:  # noqa: D102
        return [max(0.0, trace) for trace in self.traces(study)]

    def traces(self, study: Study) -> list[float]:
        """Of each layer's block of the Hessian of the mean loss, not normalised."""
        key = f"trace {self.probes} {self.tolerance}"
        return of_layers(study, "traces of the Hessian", key, partial(self._trace, study.seed))

    def _trace(self, seed: int, curvature: Curvature, layer: Layer) -> float:
        drawn, total, mean = generator(seed, "trace", layer.name), 0.0, 0.0
        for number in range(1, self.probes + 1):
            signs = curvature.vector(layer, drawn, signs=True)
            total += float(dot(curvature.product(layer, signs), signs))
            before, mean = mean, total / number
            if number > 1 and abs(mean - before) < self.tolerance * (abs(before) + 1e-6):
                break
        return mean


PART = HessianTrace
