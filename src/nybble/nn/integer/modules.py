"""The steps of an integer network. Given integers they calculate in integers; given float64, the same in floats.

The second is the simulation: integers held in float64, as networks are trained. Scales are of the second dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nybble.nn.conv import Geometry
from nybble.nn.integer.dyadic import Dyadic, Ties


def narrowest(low: int, high: int) -> torch.dtype:
    """The smallest type that holds the integers from ``low`` to ``high``.

    >>> narrowest(0, 255), narrowest(-127, 127), narrowest(-127, 255)
    (torch.uint8, torch.int8, torch.int16)
    """
    for dtype in (torch.uint8, torch.int8, torch.int16):
        ends = torch.iinfo(dtype)
        if ends.min <= low and high <= ends.max:
            return dtype
    return torch.int32


def along(values: Tensor, x: Tensor) -> Tensor:
    """Values of channels, or one, in the shape that meets ``x``, whose channels are its second dimension."""
    return values.view(1, -1, *[1] * (x.dim() - 2))


class Requantize(nn.Module):
    """``clamp(round(q m / 2^e))`` in the narrowest type.

    Args:
        by: one ratio, or one a channel. low, high: of the result.
    """

    def __init__(self, by: Dyadic, low: int, high: int) -> None:
        super().__init__()
        self.register_buffer("mantissa", by.mantissa.reshape(-1))
        self.register_buffer("exponent", by.exponent.reshape(-1))
        self.ties: Ties = by.ties
        self.low, self.high, self.dtype = low, high, narrowest(low, high)

    def forward(self, q: Tensor) -> Tensor:  # noqa: D102
        m, e = (along(getattr(self, name), q) for name in ("mantissa", "exponent"))
        by = Dyadic(mantissa=m, exponent=e, ties=self.ties)
        if q.is_floating_point():
            return by.simulate(q).clamp(self.low, self.high)
        return by.apply(q).clamp(self.low, self.high).to(self.dtype)


class Product(nn.Module):
    """A convolution or linear layer: sums of products in int32.

    Args:
        weight: codes, [out, in / groups * kernel]. bias: codes at the sums' scale, [out].
        geometry: of a convolution.
    """

    def __init__(self, weight: Tensor, bias: Tensor, geometry: Geometry | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight.to(torch.int8))
        self.register_buffer("bias", bias.to(torch.int32))
        self.geometry = geometry

    def forward(self, q: Tensor) -> Tensor:  # noqa: D102
        dtype = q.dtype if q.is_floating_point() else torch.int32
        x, weight, bias = q.to(dtype), self.get_buffer("weight").to(dtype), self.get_buffer("bias").to(dtype)
        geometry = self.geometry
        if geometry is None:
            return x @ weight.T + bias
        if not q.is_floating_point() and geometry.groups == geometry.channels[0] == geometry.channels[1] > 1:
            return _depthwise(geometry, x, weight) + along(bias, x)
        return geometry.apply(x, weight, bias)


def _depthwise(geometry: Geometry, x: Tensor, weight: Tensor) -> Tensor:
    """Sums over the kernel's places of all channels at once: torch's integer convolution goes channel by channel."""
    x, places = geometry.padded(x), weight.view(geometry.shape).flatten(2)
    sizes = zip(x.shape[2:], geometry.kernel, geometry.stride, geometry.dilation, strict=True)
    steps = [((size - (k - 1) * gap - 1) // stride + 1, stride, gap) for size, k, stride, gap in sizes]
    total: Any = 0
    for at in range(places.shape[2]):
        where: list[slice] = []
        rest = at
        for (count, stride, gap), k in reversed(list(zip(steps, geometry.kernel, strict=True))):
            first = rest % k * gap
            where.insert(0, slice(first, first + (count - 1) * stride + 1, stride))
            rest //= k
        total = total + x[(slice(None), slice(None), *where)] * along(places[:, 0, at], x)
    result: Tensor = total
    return result


class Add(nn.Module):
    """A sum of two, each brought to the sum's scale and rounded by itself."""

    def __init__(self, first: Requantize, second: Requantize) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        total: Tensor = self.first(x) + self.second(y)
        return total


class Clip(nn.Module):
    """ReLU and ReLU6: ends in codes, of each channel if scales are.

    Args:
        low, high: int32, [1] or [channels]; None leaves an end open.
    """

    def __init__(self, low: Tensor | None, high: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def forward(self, q: Tensor) -> Tensor:  # noqa: D102
        ends: list[Any] = [self._buffers[name] for name in ("low", "high")]
        return q.clamp(*(None if end is None else along(end, q).to(q.dtype) for end in ends))


class Total(nn.Module):
    """Sums over all places, in int32: the mean's division is in the scale."""

    def __init__(self, keep: bool) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, q: Tensor) -> Tensor:  # noqa: D102
        dtype = q.dtype if q.is_floating_point() else torch.int32
        return q.sum(tuple(range(2, q.dim())), keepdim=self.keep, dtype=dtype)


class Pad(nn.Module):
    """Zeros around: codes are counted from the zero point."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.widths = widths

    def forward(self, q: Tensor) -> Tensor:  # noqa: D102
        return torch.constant_pad_nd(q, self.widths, 0)


class MaxPool(nn.Module):
    """The largest code is that of the largest value."""

    def __init__(self, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool) -> None:
        super().__init__()
        self.arguments = (kernel, stride, padding, dilation, ceil)

    def forward(self, q: Tensor) -> Tensor:  # noqa: D102
        return functional.max_pool2d(q, *self.arguments)


class Flatten(nn.Module):
    """[n, channels, 1, 1] -> [n, channels]."""

    def forward(self, q: Tensor) -> Tensor:  # noqa: D102
        return q.flatten(1)
