"""Image classification: Fashion-MNIST on a residual network of 2.8M parameters; convolutions have states of rank 4."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.optimizer_quality.models import ResNet
from benchmarks.optimizer_quality.tasks import Plan, Task
from torch import Tensor, nn

MEAN, DEVIATION = 0.286, 0.353  # of the training images
SHIFT = 2  # pixels to each side


class FashionMNIST(Task):
    """30,000 images to train on, flipped and shifted; all 10,000 of the test part judge."""

    title, unit, arrays, muon = "image classification", "nats an image", ("images.",), False
    plan = Plan(
        width=64, layers=2, heads=1, context=28, steps=1170, batch=256,
        rate=2e-3, decay=0.05, betas=(0.9, 0.999), seconds=15,
    )  # fmt: skip

    def load(self, arrays: dict[str, Any]) -> None:  # noqa: D102
        self.x, self.y, *held = (
            torch.from_numpy(arrays[f"images.{name}"]).to(self.device) for name in ("x", "y", "x_held", "y_held")
        )
        self.held = held[0][: self.p.judged], held[1][: self.p.judged].long()
        self.pixels = torch.arange(28, device=self.device)

    def model(self) -> nn.Module:  # noqa: D102
        return ResNet(self.p.width, self.p.layers, 10)

    def ready(self, x: Tensor) -> Tensor:
        """uint8 [n, 28, 28] to float32 [n, 1, 28, 28]."""
        return ((x.float() / 255 - MEAN) / DEVIATION)[:, None]

    def batches(self, seed: int) -> Iterator[tuple[Tensor, ...]]:  # noqa: D102
        generator = torch.Generator().manual_seed(seed + 1)
        for index in self.order(len(self.x), seed):
            flip, *shift = torch.randint(2 * SHIFT + 1, (3, len(index), 1), generator=generator).to(self.device)
            across = (self.pixels + shift[0] - SHIFT).clamp(0, 27)
            across = torch.where(flip % 2 == 0, across, 27 - across)
            down = (self.pixels + shift[1] - SHIFT).clamp(0, 27)
            moved = self.x[index[:, None, None], down[:, :, None], across[:, None, :]]
            yield self.ready(moved), self.y[index].long()

    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor:  # noqa: D102
        x, labels = batch
        return F.cross_entropy(model(x), labels)

    def held_out(self, model: nn.Module) -> dict[str, float]:  # noqa: D102
        x, labels = self.held
        logits = torch.cat([model(self.ready(part)).float() for part in x.split(500)])
        accuracy = (logits.argmax(1) == labels).float().mean()
        return {"loss": float(F.cross_entropy(logits, labels)), "accuracy": float(accuracy)}


TASK = FashionMNIST
