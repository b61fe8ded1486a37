"""A small residual CNN trained on Fashion-MNIST with a fixed seed: eight layers, as ResNet-8 of MLPerf Tiny.

He et al. 2016, arXiv:1512.03385; three stages of 16, 32 and 64 channels, a BatchNorm behind every convolution, ReLU.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from run import hardware
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nybble.core.progress import Bars, task
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
    stem = nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    stages = [Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2)]
    return nn.Sequential(stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def trained(train: ImageSamples, folder: Path, *, epochs: int, batch: int = 128) -> nn.Module:
    """The network in eval mode from ``folder``, trained and put there first where it isn't yet."""
    file = folder / "model.safetensors"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        made = fit(train, epochs, batch)
        about = {"epochs": epochs, "batch": batch, "seed": 0, "samples": len(train.pixel_values)}
        (folder / "training.json").write_text(json.dumps(about | {"hardware": hardware("cpu")}), encoding="utf-8")
        save_file({k: v.contiguous() for k, v in made.state_dict().items()}, file)
    network = build()
    network.load_state_dict(load_file(file))
    return network.eval().requires_grad_(False)


def fit(train: ImageSamples, epochs: int, batch: int) -> nn.Module:
    """SGD with momentum, one cycle, flips and shifts of two pixels."""
    torch.manual_seed(0)
    network = build().train()
    pixels, labels = train.pixel_values, train.labels
    assert labels is not None
    steps = epochs * (len(pixels) // batch)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=steps, pct_start=0.2)
    loss = torch.zeros(())
    with task(Bars(), epochs, "train") as bar:
        for _ in range(epochs):
            order = torch.randperm(len(pixels))
            for start in range(0, len(pixels) - batch + 1, batch):
                x, y = pixels[order[start : start + batch]], labels[order[start : start + batch]]
                x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1), x)
                x = x.roll(torch.randint(-2, 3, (2,)).tolist(), (-2, -1))
                loss = nn.functional.cross_entropy(network(x), y)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
            bar.advance(note=f"loss {float(loss.detach()):.3f}")
    return network.eval()
