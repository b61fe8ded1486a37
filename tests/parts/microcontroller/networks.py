"""A network with every layer that the C has, on 12 x 12 pixels: odd and even numbers of rows, columns and channels."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from nybble.microcontroller.stack import Stack
from nybble.microcontroller.trace import stack_of

SHAPE = (1, 12, 12)


class Block(nn.Module):
    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.gelu, self.norm = nn.GELU("tanh"), nn.InstanceNorm2d(out, affine=True)
        nn.init.uniform_(self.norm.weight, 0.5, 2)
        nn.init.normal_(self.norm.bias)
        self.second = nn.Conv2d(out, out, 3, 1, 1)
        self.beside, self.last = nn.Conv2d(into, out, 1, stride), nn.LeakyReLU(0.1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.norm(self.second(self.gelu(self.first(x)))) + self.beside(x))
        return found


def everything() -> nn.Module:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8)
    torch.nn.init.uniform_(norm.running_var, 0.5, 2)  # type: ignore[arg-type]
    torch.nn.init.normal_(norm.running_mean)  # type: ignore[arg-type]
    first = (nn.Conv2d(1, 8, 3, 1, 1), norm, nn.ReLU(), nn.MaxPool2d(3, 2, 1), Block(8, 6, 2))
    depthwise = (nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU6(), nn.InstanceNorm2d(6))
    last = (nn.Conv2d(6, 7, 1), nn.Sigmoid(), nn.AvgPool2d(2), nn.Dropout(), nn.Flatten(), nn.Linear(7, 5))
    return nn.Sequential(*first, *depthwise, *last).eval()


@cache
def stack() -> Stack:
    return stack_of(everything(), SHAPE)
