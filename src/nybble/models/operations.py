"""What a block of a searched network may be: named layers of two channel counts and a stride.

``shuffle-K``, ``xception``: ShuffleNetV2's block with a depthwise K x K, and with three of 3 x 3 (Ma et al. 2018,
arXiv:1807.11164; the choices of Single Path One-Shot, Guo et al. 2019, arXiv:1904.00420).
``mb-E-K``: an inverted bottleneck of expansion E (arXiv:1801.04381; ProxylessNAS's, arXiv:1812.00332).
``sep-K``, ``dil-K``, ``max-pool``, ``avg-pool``, ``none``: those of DARTS (Liu et al. 2019, arXiv:1806.09055).
``skip``: the input; with a stride two shifted 1 x 1 convolutions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from nybble.core.errors import UsageError, did_you_mean


def convolved(
    into: int, out: int, size: int, stride: int = 1, *, groups: int = 1, dilation: int = 1, act: bool = True
) -> list[nn.Module]:
    """Convolution without bias, BatchNorm, and a ReLU where one is wanted; the image keeps its size but for strides."""
    around = dilation * (size - 1) // 2
    conv = nn.Conv2d(into, out, size, stride, around, dilation=dilation, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out), *([nn.ReLU()] if act else [])]


class Shuffle(nn.Module):
    """Half of the channels through ``main``; the other half as it is, or where the shape changes all through both."""

    def __init__(self, into: int, out: int, stride: int, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.changes = stride > 1 or into != out
        first, middle = (into, out // 2) if self.changes else (into // 2, out // 2)
        kept = into if self.changes else into // 2
        main: list[nn.Module] = [] if len(sizes) > 1 else convolved(first, middle, 1)
        width = first if len(sizes) > 1 else middle
        for number, size in enumerate(sizes):
            last = number == len(sizes) - 1
            main += convolved(width, width, size, stride if number == 0 else 1, groups=width, act=False)
            main += convolved(width, out - kept if last else middle, 1)
            width = middle
        self.main = nn.Sequential(*main)
        if self.changes:
            shape = convolved(into, into, sizes[0], stride, groups=into, act=False)
            self.beside = nn.Sequential(*shape, *convolved(into, kept, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[n, in, h, w] -> [n, out, h / stride, w / stride]."""
        if self.changes:
            return torch.cat((self.beside(x), self.main(x)), 1)
        kept, moved = x[:, ::2], x[:, 1::2]  # channels shuffled, then halved
        return torch.cat((kept, self.main(moved)), 1)


class Bottleneck(nn.Module):
    """Wider by ``expansion``, depthwise, narrow again; beside the input where the shape stays."""

    def __init__(self, into: int, out: int, stride: int, expansion: int, size: int) -> None:
        super().__init__()
        wide = into * expansion
        self.main = nn.Sequential(
            *convolved(into, wide, 1), *convolved(wide, wide, size, stride, groups=wide),
            *convolved(wide, out, 1, act=False),
        )  # fmt: skip
        self.stays = stride == 1 and into == out

    def forward(self, x: Tensor) -> Tensor:
        """[n, in, h, w] -> [n, out, h / stride, w / stride]."""
        y: Tensor = self.main(x)
        return x + y if self.stays else y


class Halved(nn.Module):
    """Two 1 x 1 convolutions of stride 2, the second a pixel further: DARTS's way to halve an image."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.first = nn.Conv2d(into, out // 2, 1, 2, bias=False)
        self.second = nn.Conv2d(into, out - out // 2, 1, 2, bias=False)
        self.norm = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        """[n, in, h, w] -> [n, out, (h + 1) / 2, (w + 1) / 2]; behind an odd edge are zeros."""
        x = self.relu(x)
        moved = nn.functional.pad(x, (0, 1, 0, 1))[..., 1:, 1:]
        found: Tensor = self.norm(torch.cat((self.first(x), self.second(moved)), 1))
        return found


class Nothing(nn.Module):
    """Zeros of the output's shape."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """[n, c, h, w] -> [n, c, h / stride, w / stride]."""
        return x[..., :: self.stride, :: self.stride] * 0


def _separable(size: int, dilation: int, into: int, out: int, stride: int) -> nn.Module:
    """Depthwise and 1 x 1 behind a ReLU; twice without dilation."""
    layers: list[nn.Module] = []
    for number in range(1 if dilation > 1 else 2):
        wide = out if number else into
        layers += [nn.ReLU(), *convolved(wide, wide, size, 1 if number else stride, groups=wide, dilation=dilation)[:1]]
        layers += convolved(wide, out, 1, act=False)
    return nn.Sequential(*layers)


def _pool(kind: str, into: int, out: int, stride: int) -> nn.Module:
    return nn.MaxPool2d(3, stride, 1) if kind == "max" else nn.AvgPool2d(3, stride, 1, count_include_pad=False)


def _skip(into: int, out: int, stride: int) -> nn.Module:
    return nn.Identity() if stride == 1 else Halved(into, out)


def _shuffle(sizes: tuple[int, ...], into: int, out: int, stride: int) -> nn.Module:
    return Shuffle(into, out, stride, sizes)


def _bottleneck(expansion: int, size: int, into: int, out: int, stride: int) -> nn.Module:
    return Bottleneck(into, out, stride, expansion, size)


def _nothing(into: int, out: int, stride: int) -> nn.Module:
    return Nothing(stride)


OPERATIONS: dict[str, Callable[[int, int, int], nn.Module]] = {
    **{f"shuffle-{k}": partial(_shuffle, (k,)) for k in (3, 5, 7)}, "xception": partial(_shuffle, (3, 3, 3)),
    **{f"mb-{e}-{k}": partial(_bottleneck, e, k) for e in (3, 6) for k in (3, 5, 7)},
    **{f"sep-{k}": partial(_separable, k, 1) for k in (3, 5)},
    **{f"dil-{k}": partial(_separable, k, 2) for k in (3, 5)},
    "max-pool": partial(_pool, "max"), "avg-pool": partial(_pool, "avg"), "skip": _skip, "none": _nothing,
}  # fmt: skip
KEEPING = ("max-pool", "avg-pool", "skip", "none")
"""Those that give as many channels as they get."""


def make_operation(name: str, into: int, out: int, stride: int) -> nn.Module:
    """A block.

    Raises:
        UsageError: no such operation, or it can't change the number of channels (``shuffle`` needs an even one).
    """
    if name not in OPERATIONS:
        raise UsageError(f"no operation {name!r}.{did_you_mean(name, OPERATIONS)}")
    if name in KEEPING and into != out:
        raise UsageError(f"operation {name!r} keeps the channels, and this block has {into} and then {out}.")
    halves = name.startswith(("shuffle", "xception"))
    if halves and (out % 2 or (out <= into if stride > 1 or into != out else into % 2)):
        raise UsageError(
            f"operation {name!r} goes from {into} to {out} channels here; it halves them, and adds some with a stride: "
            "give an even number, behind a stride a larger one."
        )
    return OPERATIONS[name](into, out, stride)
