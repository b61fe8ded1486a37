"""The KL divergence of the model's predictions with one layer quantized and all others in float, in nats a prediction.

What is lost in truth, but for what errors of several layers do together; one forward of all data a layer and format.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nybble.core.progress import task
from nybble.search.predictions import Predictions
from nybble.search.sensitivities import Sensitivity
from nybble.search.study import Study


@dataclass(frozen=True, kw_only=True)
class Kl(Sensitivity):
    """Of a model without logits half the squared distance of its hidden states."""

    def measure(self, study: Study) -> Tensor:  # noqa: D102
        predictions = Predictions(study)
        rows = []
        with task(study.progress, len(study.layers), "layers, each alone quantized") as bar:
            for number, layer in enumerate(study.layers):
                rows.append(study.keep(f"kl {layer.name}", partial(self._alone, study, predictions, number)))
                bar.advance(note=layer.name)
        return torch.tensor(rows, dtype=torch.float64)

    def _alone(self, study: Study, predictions: Predictions, number: int) -> list[float]:
        found = []
        for item in range(len(study.layers[number].menu)):
            with study.quantized({number: item}):
                found.append(predictions.divergence())
        return found


PART = Kl
