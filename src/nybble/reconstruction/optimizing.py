"""How parts are moved: the update rule, the learning rate over the steps, the clipping of gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from nybble.reconstruction import Reconstruction

DEFAULT_RATE = 1e-3
_KEPT = 0.9
"""Of RMSprop's mean of squares, a step: VQ4DiT's (torch's own default is 0.99)."""


class Mover:
    """Moves parameters against their gradients.

    Args:
        groups: what is learned, by learning-rate group.
        options: of the engine.
    """

    def __init__(self, groups: Mapping[str, list[nn.Parameter]], options: Reconstruction) -> None:
        default = options.rates.get("default", DEFAULT_RATE)
        given = [{"params": ps, "lr": options.rates.get(name, default)} for name, ps in groups.items()]
        self.parameters = [p for parameters in groups.values() for p in parameters]
        self.options = options
        if options.optimizer == "adam":
            self.optimizer: torch.optim.Optimizer = torch.optim.Adam(given)
        elif options.optimizer == "adamw":
            self.optimizer = torch.optim.AdamW(given, weight_decay=options.decay)
        elif options.optimizer == "rmsprop":
            self.optimizer = torch.optim.RMSprop(given, alpha=_KEPT)
        else:
            self.optimizer = torch.optim.SGD(given)  # of the gradients' signs
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: rate(options, step))

    def clear(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad()

    def shape(self) -> None:
        """Shorten the gradients, or take their signs, as the options say."""
        if self.options.max_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.options.max_norm)
        if self.options.optimizer == "sign":
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad.sign_()

    def move(self) -> None:
        """One step against the gradients."""
        self.optimizer.step()
        self.schedule.step()


def rate(options: Reconstruction, step: int) -> float:
    """The share of its learning rate that every group has at a step, counted from 0.

    Up in a line over the warm-up, ``(step + 1) / warm``; then from 1 to ``final`` at the end of the last step: along
    half a cosine, in a line, or not at all.
    """
    warm = round(options.warmup * options.steps)
    if step < warm:
        return (step + 1) / warm
    if options.schedule == "constant":
        return 1.0
    t = (step - warm) / max(1, options.steps - warm)
    fallen = 0.5 * (1 + math.cos(math.pi * t)) if options.schedule == "cosine" else 1 - t
    return options.final + (1 - options.final) * fallen
