"""A small residual CNN trained on Fashion-MNIST with a fixed seed: eight layers, as ResNet-8 of MLPerf Tiny.

He et al. 2016, arXiv:1512.03385; three stages of 16, 32 and 64 channels, a BatchNorm behind every convolution, ReLU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fashion import kept, train
from torch import Tensor, nn

from nybble.data.images import ImageSamples


class Block(nn.Module):
    """Two 3 x 3 convolutions beside an identity, or a 1 x 1 convolution where the shape changes."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.first_norm, self.relu = nn.BatchNorm2d(out), nn.ReLU()
        self.second = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(out)
        self.beside: nn.Module = nn.Identity()
        if stride > 1 or into != out:
            self.beside = nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.last = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """[n, in, h, w] -> [n, out, h / stride, w / stride]."""
        y = self.second_norm(self.second(self.relu(self.first_norm(self.first(x)))))
        found: Tensor = self.last(y + self.beside(x))
        return found


def build() -> nn.Module:
    """The network, with random weights."""
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    stages = [Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2)]
    return nn.Sequential(stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def trained(
    samples: ImageSamples, folder: Path, *, epochs: int, batch: int = 128, device: str = "cpu"
) -> tuple[nn.Module, dict[str, Any]]:
    """The network from ``folder``, trained and put there first where it isn't yet (SGD, one cycle); and how it was."""

    def make() -> nn.Module:
        network = build().to(device)
        optimizer = torch.optim.SGD(network.parameters(), 0.2, momentum=0.9, weight_decay=5e-4, nesterov=True)
        return train(
            network, samples, optimizer, epochs=epochs, batch=batch, rise=0.2, device=device, bfloat16=device != "cpu"
        )

    about = {"epochs": epochs, "batch": batch, "seed": 0, "samples": len(samples.pixel_values)}
    return kept(folder, build, make, **about)
