"""A convolution whose weight is a QTensor and whose input and output may be rounded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nybble.nn.activation import ActivationQuantizer
from nybble.nn.layer import QuantLayer
from nybble.nn.plain import computes_as, known_as
from nybble.qtensor import QTensor

CONVS = (nn.Conv1d, nn.Conv2d)
SAME = frozenset({"timm.layers.conv2d_same.Conv2dSame"})


def is_conv(module: nn.Module) -> bool:
    """Whether :class:`QuantConv` can stand for it: ``nn.Conv1d``, ``nn.Conv2d``, timm's ``Conv2dSame``; no others."""
    return computes_as(module, CONVS) or known_as(module, SAME)


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Everything of a convolution but its tensors; sizes are one for each spatial dimension.

    ``padding``: zeros (or what ``padding_mode`` says) on both sides; None pads so that the output has the size of the
    input over the stride, as TensorFlow does.
    """

    channels: tuple[int, int]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding: tuple[int, ...] | None
    padding_mode: str

    @staticmethod
    def of(module: nn.Module) -> Geometry:
        """Of a float convolution."""
        conv: Any = module
        same = conv.padding == "same" or known_as(module, SAME)
        plain = (0,) * len(conv.kernel_size) if conv.padding == "valid" else conv.padding
        return Geometry(
            channels=(conv.out_channels, conv.in_channels), kernel=conv.kernel_size, stride=conv.stride,
            dilation=conv.dilation, groups=conv.groups, padding=None if same else plain,
            padding_mode=conv.padding_mode,
        )  # fmt: skip

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.channels[0], self.channels[1] // self.groups, *self.kernel

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution, with a weight of any shape that has its elements."""
        run: Any = functional.conv1d if len(self.kernel) == 1 else functional.conv2d
        inside = self.padding if self.padding is not None and self.padding_mode == "zeros" else None
        x = x if inside is not None else self.padded(x)
        y: Tensor = run(x, weight.view(self.shape), bias, self.stride, inside or 0, self.dilation, self.groups)
        return y

    def padded(self, x: Tensor) -> Tensor:
        """The input with its padding."""
        if self.padding is None:
            sizes = zip(x.shape[2:], self.kernel, self.stride, self.dilation, strict=True)
            wanted = [max(0, (-(-size // step) - 1) * step + (k - 1) * gap + 1 - size) for size, k, step, gap in sizes]
            sides = [(w // 2, w - w // 2) for w in wanted]
        else:
            sides = [(p, p) for p in self.padding]
        around = [side for pair in reversed(sides) for side in pair]
        if self.padding_mode == "zeros":
            return torch.constant_pad_nd(x, around, 0)  # functional.pad's zero is a float, for integers too
        return functional.pad(x, around, mode=self.padding_mode)

    def patches(self, x: Tensor, most: int) -> Tensor:
        """What the kernels are multiplied with, as rows of a matrix (im2col).

        Args:
            x: the input, [images, channels, ...].
            most: patches an image to keep, evenly spread over places.

        Returns:
            [rows, in / groups * kernel]; of a grouped convolution [groups, rows, ...]: each group sees other channels.
        """
        x, flat = self.padded(x), len(self.kernel) == 1
        sizes = [(*size, 1) if flat else size for size in (self.kernel, self.dilation, self.stride)]
        columns = functional.unfold((x[..., None] if flat else x).float(), sizes[0], sizes[1], 0, sizes[2])
        columns = columns[..., :: -(-columns.shape[-1] // most)].to(x.dtype)
        rows = columns.view(len(x), self.groups, -1, columns.shape[-1]).permute(1, 0, 3, 2).flatten(1, 2)
        return rows if self.groups > 1 else rows[0]


class QuantConv(QuantLayer):
    """Stands for a convolution.

    Args:
        weight: QTensor [out, in / groups * kernel], or such a plain tensor where weights stay in float.
        bias: [out] or None.
        geometry: of the float convolution.
        inputs, outputs: quantizers of what enters and leaves: one scale for the whole tensor, or for each plane.
        folded: full name of the BatchNorm that is in weight and bias now; empty without one.
    """

    def __init__(
        self,
        weight: QTensor | Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        inputs: ActivationQuantizer | None = None,
        outputs: ActivationQuantizer | None = None,
        folded: str = "",
    ) -> None:
        super().__init__(weight, bias, inputs, outputs)
        self.geometry, self.folded = geometry, folded
        # MobileNetV2 reads these of its convolutions.
        self.kernel_size, self.stride, self.dilation = geometry.kernel, geometry.stride, geometry.dilation

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """As the float convolution's."""
        return self.geometry.apply(x, weight, bias)

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.geometry.channels[1]}, {self.geometry.channels[0]}, kernel={self.geometry.kernel}"
