"""Confidence-guided annealing (CGA): late in training only weights near a boundary between two codes go on training.

    trains  <=>  the nearest boundary is at most ``range`` away, in units of the gap between its two levels

The others, of whose code there is no doubt, are frozen: no gradient, and the value from before the optimizer's step put
back behind it, whatever momentum or weight decay made of it. The mask is made anew at every update: a weight that
leaves the band is frozen from there on, so those that oscillate come to rest on one side.

OFQ, Liu et al. 2023, "Oscillation-free Quantization for Low-bit Vision Transformers", arXiv:2302.02210. The paper
anneals in 25 epochs more, behind 300, at the smallest rate of its schedule: ``start`` 0.92 of both together. The ends
of the range are no boundaries: a weight beyond them is frozen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nybble.core.errors import SchemeError
from nybble.learned import Learned
from nybble.nn.twin import FakeWeight
from nybble.training.callbacks import Acting, Callback, rounded_weights
from nybble.training.callbacks._cells import check_nearest, near_boundaries

NAME = "annealing"


class Freezing(Acting):
    """See the module.

    Args:
        weights: by name. options: of the callback.
    """

    def __init__(self, weights: Mapping[str, FakeWeight], options: Annealing) -> None:
        self.weights, self.options = weights, options
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}  # which train, and what all were

    @torch.no_grad()
    def before_update(self, progress: float) -> None:  # noqa: D102
        self._kept = {}
        if progress < self.options.start:
            return
        for name, weight in self.weights.items():
            trains, latent = self._near(weight), weight.latent
            self._kept[name] = trains, latent.detach().clone()
            if latent.grad is not None:
                latent.grad.mul_(trains)

    @torch.no_grad()
    def after_update(self, progress: float) -> None:  # noqa: D102
        for name, (trains, before) in self._kept.items():
            latent = self.weights[name].latent
            latent.copy_(torch.where(trains, latent, before))
            self._kept[name] = trains, before[:0]  # the mask alone is asked for from here on

    def _near(self, weight: FakeWeight) -> Tensor:
        assert isinstance(weight.learned, Learned)
        return near_boundaries(weight.learned, weight.latent.detach(), self.options.range)

    def newest(self) -> dict[str, float]:
        """``frozen``: the share of all weights."""
        count = sum(weight.latent.numel() for weight in self.weights.values())
        trained = sum(int(trains.sum()) for trains, _ in self._kept.values())
        return {"frozen": 1 - trained / count if self._kept else 0.0}

    def layers(self) -> dict[str, dict[str, float]]:
        """``weights``, and how many are ``near`` a boundary."""
        return {
            name: {"weights": weight.latent.numel(), "near": int(self._near(weight).sum())}
            for name, weight in self.weights.items()
        }


@dataclass(frozen=True, kw_only=True)
class Annealing(Callback):
    """See the module.

    Attributes:
        start: progress of the training, 0 to 1, from which on it freezes.
        range: how far from a boundary a weight still trains.
    """

    start: float = 0.92
    range: float = 0.005

    def __post_init__(self) -> None:
        if not 0 <= self.start < 1:
            raise SchemeError(f"annealing: start={self.start:g} is a share of the training; give 0 or more, below 1.")
        if not self.range >= 0:
            raise SchemeError(
                f"annealing: range={self.range:g} is a distance in units of the gap between two levels; give 0 or more."
            )

    def attach(self, model: nn.Module) -> Freezing:  # noqa: D102
        weights = rounded_weights(model, NAME)
        for name, weight in weights.items():
            check_nearest(NAME, name, weight)
        return Freezing(weights, self)


PART = Annealing
