"""The squared error of weights, relative to the weights: no data, seconds.

With ``scaled_by: noise`` each layer's error is weighed by what noise of that size in its weights does to the model's
predictions: perplexity grows linearly in the relative squared errors of layers, each with a coefficient of its own
(the linearity theorem of Malinovskii et al. 2024, HIGGS, arXiv:2411.17525, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from nybble.core.errors import SchemeError
from nybble.core.progress import task
from nybble.core.seeds import generator
from nybble.nn.kinds import values_at
from nybble.search.predictions import Predictions
from nybble.search.sensitivities import Sensitivity, squared_changes
from nybble.search.study import Layer, Study


@dataclass(frozen=True, kw_only=True)
class WeightError(Sensitivity):
    """``||Q(W) - W||^2 / ||W||^2`` times a factor.

    Attributes:
        scaled_by: ``size``: the layer's number of weights; ``noise``: the KL divergence that Gaussian noise in the
            layer's weights causes, over the noise's relative squared norm; ``none``.
        noise: that norm's square.
    """

    scaled_by: Literal["size", "noise", "none"] = "size"
    noise: float = 0.01

    def __post_init__(self) -> None:
        if not self.noise > 0:
            raise SchemeError(f"noise is the square of a norm, above 0; got {self.noise}.")

    def measure(self, study: Study) -> Tensor:  # noqa: D102
        norms = [float(study.matrices(layer).detach().double().square().sum()) for layer in study.layers]
        factors = [factor / (norm or 1.0) for factor, norm in zip(self._factors(study), norms, strict=True)]
        return squared_changes(study, factors)

    def _factors(self, study: Study) -> list[float]:
        if self.scaled_by == "none":
            return [1.0] * len(study.layers)
        if self.scaled_by == "size":
            return [float(study.matrices(layer).numel()) for layer in study.layers]
        predictions = Predictions(study)
        found = []
        with task(study.progress, len(study.layers), "noise in a layer's weights") as bar:
            for layer in study.layers:
                key = f"noise {self.noise} {layer.name}"
                found += study.keep(key, partial(self._rise, study, layer, predictions))
                bar.advance(note=layer.name)
        return found

    @torch.no_grad()
    def _rise(self, study: Study, layer: Layer, predictions: Predictions) -> list[float]:
        """Divergence over the squared relative norm of the noise that caused it."""
        matrices = study.matrices(layer).detach()
        noise = torch.randn(matrices.shape, generator=generator(study.seed, "noise", layer.name), dtype=torch.float32)
        size = (self.noise * matrices.double().square().sum() / noise.double().square().sum()).sqrt().to(torch.float32)
        moved = matrices.float() + size * noise.to(matrices.device)
        names = values_at(study.model, layer.name, moved if layer.target.matrices > 1 else moved[0])
        before = {name: study.model.get_parameter(name).clone() for name in names}
        try:
            for name, value in names.items():
                study.model.get_parameter(name).copy_(value)
            return [predictions.divergence() / self.noise]
        finally:
            for name, value in before.items():
                study.model.get_parameter(name).copy_(value)


PART = WeightError
