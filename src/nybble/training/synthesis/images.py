"""Batches of images by gradient from noise, round by round.

    round 0      drawn classes         loss = main CE(f(x), class) + norms R_BN + tv1 R_TV1 + tv2 R_TV2 + l2 R_l2
    round k + 1  from noise again      softmax(f(image of round k)) in the class's place (recursive label calibration)

An update sees a random window of the canvas, at half the resolution first, and moves what is in it (regional update).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from nybble.core.errors import LearningError, ModelError
from nybble.core.seeds import generator
from nybble.data.images import Preparation
from nybble.training.synthesis.options import Synthesis, rate
from nybble.training.synthesis.terms import NormDistance, size, soft_cross_entropy, variation, watched

_LOOK = 100
"""Updates between two looks at whether the loss is a number: a look waits for the device."""


class Region(NamedTuple):
    """A window: ``scale`` 2 is of the canvas at half its resolution; ``top``, ``left`` are in its pixels."""

    scale: int
    top: int
    left: int
    height: int
    width: int
    flip: bool

    def of(self, canvas: Tensor) -> Tensor:
        """What the model sees, [samples, channels, height, width]."""
        x = canvas if self.scale == 1 else functional.avg_pool2d(canvas, self.scale)
        x = x[..., self.top : self.top + self.height, self.left : self.left + self.width]
        return x.flip(-1) if self.flip else x

    def within(self, canvas: Tensor) -> tuple[slice, slice]:
        """Rows and columns of the canvas that it is made of."""
        s = self.scale
        return slice(s * self.top, s * (self.top + self.height)), slice(s * self.left, s * (self.left + self.width))


@dataclass(frozen=True, kw_only=True)
class Made:
    """Images of one round of one batch.

    Attributes:
        images: uint8 [samples, canvas, canvas, channels].
        labels: int64 [samples], the likeliest class of what they were made towards.
        logits: float32 [samples, classes], the model's of the middle window of the bytes.
        loss: of the last update. distance: R_BN of it.
    """

    images: Tensor
    labels: Tensor
    logits: Tensor
    loss: float
    distance: float


class Maker:
    """Makes images of one model.

    Args:
        model: a classifier with BatchNorms, on its device; it stays bit for bit as it is.
        wants: how it takes images.
        classes: how many it tells apart.
        options: how.

    Raises:
        UsageError: a canvas smaller than the model's images.
    """

    def __init__(self, model: nn.Module, wants: Preparation, classes: int, options: Synthesis) -> None:
        self.model, self.wants, self.classes, self.options = model, wants, classes, options
        self.device = next(model.parameters()).device
        self.window = (wants.height, wants.width)
        self.canvas = (options.side(wants.height), options.side(wants.width))
        self.mean, self.std = (
            torch.tensor(x, dtype=torch.float32, device=self.device).reshape(-1, 1, 1) for x in (wants.mean, wants.std)
        )

    def targets(self, batch: int, before: Tensor | None) -> Tensor:
        """Chances [samples, classes]: of drawn classes, a part of a random order; else of the logits ``before``."""
        if before is not None:
            return before.to(self.device).float().softmax(-1)
        options, found = self.options, list[Tensor]()
        first = batch * options.batch
        for turn in range(first // self.classes, (first + options.batch - 1) // self.classes + 1):
            order = torch.randperm(self.classes, generator=generator(options.seed, "synthesis", "classes", str(turn)))
            found.append(order)
        chosen = torch.cat(found)[first % self.classes :][: options.batch]
        return functional.one_hot(chosen, self.classes).float().to(self.device)

    def make(
        self, batch: int, number: int, before: Tensor | None, told: Callable[[int, float], None] = lambda n, loss: None
    ) -> Made:
        """One round of one batch.

        Args:
            batch: which one.
            number: which of its rounds.
            before: the model's logits of the round before, [samples, classes]; None in the first one.
            told: gets the number of updates since the last call, and the loss.

        Raises:
            ModelError: the model has no BatchNorm, or gives logits of other classes. LearningError: a loss that is no
                number.
        """
        options = self.options
        chances = self.targets(batch, before)
        drawn = generator(options.seed, "synthesis", str(batch), str(number))
        shape = (len(chances), self.wants.channels, *self.canvas)
        x = torch.randn(shape, generator=drawn).to(self.device).requires_grad_(True)
        last = (float("nan"), float("nan"))
        with watched(self.model, options.first_norm) as norms:
            for scale, steps in ((2, options.half_steps), (1, options.full_steps)):
                if steps:
                    last = self._stage(x, chances, scale, steps, drawn, norms, told)
            pixels = self._bytes(x.detach())
            logits = self.logits(pixels)
        images = pixels.permute(0, 2, 3, 1).cpu()
        return Made(images=images, labels=chances.argmax(-1).cpu(), logits=logits.cpu(), loss=last[0], distance=last[1])

    def _stage(
        self, x: Tensor, chances: Tensor, scale: int, steps: int, drawn: torch.Generator, norms: NormDistance,
        told: Callable[[int, float], None],
    ) -> tuple[float, float]:  # fmt: skip
        """Move the canvas; the last loss and distance."""
        options = self.options
        adam = torch.optim.Adam([x], options.lr, (options.beta1, options.beta2), eps=1e-8)
        for step in range(steps):
            adam.param_groups[0]["lr"] = rate(step, steps, options)
            region = self.region(scale, drawn)
            loss, distance = self.loss(region.of(x), chances, norms)
            adam.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.update(x, adam, region)
            if (step + 1) % _LOOK == 0 or step == steps - 1:
                self._look(step, float(loss.detach()))
                told(step % _LOOK + 1, float(loss.detach()))
        return float(loss.detach()), float(distance)

    def _look(self, step: int, loss: float) -> None:
        if not math.isfinite(loss):
            raise LearningError(
                f"the loss of update {step + 1} is {loss}: the model's weights or statistics hold NaN or Inf, or lr is "
                "too large."
            )

    def region(self, scale: int, drawn: torch.Generator) -> Region:
        """A window drawn at random."""
        height, width = (side // scale for side in self.window)
        rooms = [side // scale - inner for side, inner in zip(self.canvas, (height, width), strict=True)]
        top, left = (int(torch.randint(room + 1, (), generator=drawn)) for room in rooms)
        flip = bool(torch.rand((), generator=drawn) < 0.5) and self.options.flip
        return Region(scale, top, left, height, width, flip)

    def loss(self, seen: Tensor, chances: Tensor, norms: NormDistance) -> tuple[Tensor, Tensor]:
        """Of one window, and its R_BN without a gradient."""
        options = self.options
        logits = self._called(seen)
        distance, (tv1, tv2) = norms.total(), variation(seen)
        total = options.main * soft_cross_entropy(logits, chances) + options.norms * distance
        return total + options.tv1 * tv1 + options.tv2 * tv2 + options.l2 * size(seen), distance.detach()

    @torch.no_grad()
    def update(self, x: Tensor, adam: torch.optim.Optimizer, region: Region) -> None:
        """Adam's step, in the window alone where it is to be strict; then pixels are what bytes can be."""
        before = x.detach().clone() if self.options.strict else None
        adam.step()
        if before is not None:
            rows, columns = region.within(x)
            before[..., rows, columns] = x[..., rows, columns]
            x.copy_(before)
        low, high = -self.mean / self.std, (1 - self.mean) / self.std
        x.copy_(torch.minimum(torch.maximum(x, low), high))

    @torch.no_grad()
    def logits(self, pixels: Tensor) -> Tensor:
        """The model's of the middle window of bytes [samples, channels, canvas, canvas]."""
        x = (middle(pixels, self.window).float() / 255 - self.mean) / self.std
        return self._called(x)

    def _bytes(self, x: Tensor) -> Tensor:
        return ((x * self.std + self.mean) * 255).round().clamp(0, 255).to(torch.uint8)

    def _called(self, x: Tensor) -> Tensor:
        model: Any = self.model
        logits: Tensor = model(pixel_values=x).logits.float()
        if logits.shape[-1] != self.classes:
            raise ModelError(
                f"the model's config names {self.classes} classes, and its head gives {logits.shape[-1]}; correct the "
                "config's id2label."
            )
        return logits


def middle(pixels: Tensor, window: tuple[int, int]) -> Tensor:
    """The middle of images [..., height, width]."""
    top, left = ((side - inner) // 2 for side, inner in zip(pixels.shape[-2:], window, strict=True))
    return pixels[..., top : top + window[0], left : left + window[1]]
