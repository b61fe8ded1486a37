"""How images are made; the defaults are those of the authors' code (github.com/liuzechun/Data-Free-NAS)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from nybble.core.errors import UsageError
from nybble.core.options import at_least_one, check_types


@dataclass(frozen=True, kw_only=True)
class Synthesis:
    """Sizes, rates and weights.

    Attributes:
        count: of images, of all rounds together. batch: images that are made at once.
        rounds: the first towards drawn classes, each later one anew from noise towards what the model makes of the
            images of the round before. keep: ``all`` of them, or the ``last`` alone.
        half_steps, full_steps: updates at half the resolution, then at all of it.
        canvas: pixels of a side that are made, of which a random window is what the model sees at an update; None: 8/7
            of what the model takes.
        store: the middle ``window`` of a canvas, in the model's size, or all of the ``canvas``.
        strict: an update moves nothing outside its window; otherwise Adam's momentum does.
        flip: windows are mirrored at random.
        lr, beta1, beta2: of Adam. warmup: updates of a stage in which the rate grows; then it falls as half a cosine.
        main, norms, tv1, tv2, l2: weights of the class, and of each of :mod:`nybble.training.synthesis.terms`.
        first_norm: how many times the first BatchNorm counts.
        seed: of classes, noise, windows.
    """

    count: int = 1000
    batch: int = 50
    rounds: int = 10
    keep: Literal["all", "last"] = "all"
    half_steps: int = 2000
    full_steps: int = 3000
    canvas: int | None = None
    store: Literal["window", "canvas"] = "window"
    strict: bool = True
    flip: bool = True
    lr: float = 0.25
    beta1: float = 0.5
    beta2: float = 0.9
    warmup: int = 100
    main: float = 1.0
    norms: float = 0.01
    tv1: float = 0.0
    tv2: float = 1e-4
    l2: float = 1e-5
    first_norm: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self, "synthesis")
        at_least_one(count=self.count, batch=self.batch, rounds=self.rounds, full_steps=self.full_steps)
        if self.half_steps < 0 or self.warmup < 0:
            raise UsageError("half_steps and warmup are numbers of updates, 0 or more.")
        for steps in (self.half_steps, self.full_steps):
            if 0 < steps <= self.warmup:
                raise UsageError(
                    f"warmup is {self.warmup}, and a stage has {steps} updates; give it more, or a shorter warmup."
                )
        for name in ("main", "norms", "tv1", "tv2", "l2", "first_norm"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} is {getattr(self, name)}; a weight is 0 or more.")
        if self.lr <= 0 or not all(0 <= beta < 1 for beta in (self.beta1, self.beta2)):
            raise UsageError("lr is a number above 0, beta1 and beta2 from 0 to below 1.")

    def side(self, window: int) -> int:
        """Pixels of a side of the canvas around a window.

        Raises:
            UsageError: the canvas is smaller, or can't be halved.
        """
        found = 2 * round(window * 4 / 7) if self.canvas is None else self.canvas
        if found < window or (self.half_steps and found % 2):
            least = window + window % 2
            raise UsageError(
                f"canvas is {found}, and the model sees windows of {window}; it is an even number, {least} or more."
            )
        return found

    @property
    def batches(self) -> int:
        """How many batches there are, each with all its rounds."""
        return -(-self.count // (self.batch * (self.rounds if self.keep == "all" else 1)))


def rate(step: int, steps: int, options: Synthesis) -> float:
    """Adam's rate at an update of a stage: a line from 0 to ``lr``, then half a cosine to 0."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    return options.lr * 0.5 * (1 + math.cos(math.pi * (step - options.warmup) / (steps - options.warmup)))
