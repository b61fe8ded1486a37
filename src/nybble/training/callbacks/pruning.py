"""Pruning in steps, then ternary weights, then their scales alone: the stages of pruning ternary quantization.

    up to ``ternary``    the share that is 0 goes from ``first`` to ``share`` in ``raises`` steps; at each the weights
                         that it takes are set to 0, and may come back
    up to ``final``      ternary forward, the gradient through the projection (:mod:`nybble.learned.pruned`)
    to the end           no weight moves: gains, norms and biases train

Liu et al. 2021, "Pruning Ternary Quantization", arXiv:2107.10998; the places of the stages are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from nybble.core.errors import SchemeError
from nybble.learned.pruned import PrunedTernary, check_left
from nybble.nn.twin import FakeWeight
from nybble.training.callbacks import Acting, Callback, rounded_weights

NAME = "pruning"


class Pruning(Acting):
    """See the module.

    Args:
        weights: by name, each pruned. options: of the callback.
    """

    def __init__(self, weights: Mapping[str, FakeWeight], options: PruningInSteps) -> None:
        self.weights, self.options = weights, options

    @torch.no_grad()
    def follow(self, progress: float) -> None:
        """Be where ``progress`` says: for what an update at it computes."""
        share, ternary = self.options.share_at(progress), progress >= self.options.ternary
        for weight in self.weights.values():
            learned, latent = _pruned(weight), weight.latent
            if share != learned.share:
                learned.share = share
                if not ternary:
                    kept = learned.directions(latent)[1] != 0
                    latent.mul_(learned.quantizer.granularity.from_blocks(kept, tuple(latent.shape)))
            if ternary and not learned.ternary:
                learned.gain.copy_(learned.least_squares(latent))
            learned.ternary, learned.led = ternary, True

    @torch.no_grad()
    def before_update(self, progress: float) -> None:  # noqa: D102
        if progress >= self.options.final:
            for weight in self.weights.values():
                weight.latent.grad = None  # neither momentum nor decay moves it

    def after_update(self, progress: float) -> None:  # noqa: D102
        self.follow(progress)

    @torch.no_grad()
    def newest(self) -> dict[str, float]:
        """``pruned``: the share of all weights; ``cosine``: of the weights and their signs, the mean of all blocks."""
        found = self.layers().values()
        count = sum(layer["weights"] for layer in found)
        cosines = torch.cat([_pruned(weight).cosine(weight.latent) for weight in self.weights.values()])
        return {"pruned": sum(layer["pruned"] for layer in found) / count, "cosine": float(cosines.mean())}

    @torch.no_grad()
    def layers(self) -> dict[str, dict[str, float]]:
        """``weights``, how many are ``pruned``, and the ``entropy`` of the codes, bits a weight."""
        found = {}
        for name, weight in self.weights.items():
            learned, latent = _pruned(weight), weight.latent
            t = learned.quantizer.granularity.from_blocks(learned.directions(latent)[1], tuple(latent.shape))
            share = torch.stack([(t == sign).double().mean() for sign in (-1, 0, 1)])
            found[name] = {
                "weights": latent.numel(), "pruned": int((t == 0).sum()),
                "entropy": float(-torch.special.xlogy(share, share).sum() / torch.log(torch.tensor(2.0))),
            }  # fmt: skip
        return found


def _pruned(weight: FakeWeight) -> PrunedTernary:
    assert isinstance(weight.learned, PrunedTernary)
    return weight.learned


@dataclass(frozen=True, kw_only=True)
class PruningInSteps(Callback):
    """See the module.

    Attributes:
        first, share: of a layer's weights that are 0, at the first update and at the last.
        raises: steps from one to the other.
        ternary: progress of the training, 0 to 1, from which on weights are ternary.
        final: from which on no weight moves.
    """

    first: float = 0.3
    share: float = 0.6
    raises: int = 5
    ternary: float = 0.4
    final: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.share < 1:
            raise SchemeError(
                f"pruning: from {self.first:g} to {self.share:g} of the weights are 0; give 0 or more, rising, below 1."
            )
        if self.raises < 1:
            raise SchemeError(f"pruning: raises={self.raises} is a number of steps; give 1 or more.")
        if not 0 <= self.ternary <= self.final <= 1:
            raise SchemeError(
                f"pruning: ternary={self.ternary:g} and final={self.final:g} are shares of the training; the first "
                "comes before the second, both from 0 to 1."
            )

    def share_at(self, progress: float) -> float:
        """Of the weights that are 0."""
        if progress >= self.ternary or self.raises == 1:
            return self.share
        step = int(progress / self.ternary * self.raises)
        return self.first + (self.share - self.first) * step / (self.raises - 1)

    def attach(self, model: nn.Module) -> Pruning:  # noqa: D102
        weights = rounded_weights(model, NAME)
        for name, weight in weights.items():
            if not isinstance(weight.learned, PrunedTernary):
                raise SchemeError(
                    f"callback pruning moves the share of weights that the part 'pruned' learns, and {name} is learned "
                    "otherwise; say learned: {weights: pruned}."
                )
            began, weight.learned.share = weight.learned.share, self.share
            check_left(weight.learned, weight.latent.detach(), f"callback pruning: {name}")
            weight.learned.share = began
        acting = Pruning(weights, self)
        if not all(_pruned(weight).led for weight in weights.values()):
            acting.follow(0.0)
        return acting


PART = PruningInSteps
