"""The three steps of a training step as matrix products ``C[N, M] = A[N, K] B[K, M]``, layer by layer.

=============  ==============  ====================================  ==================================  ============
layer          step            A                                     B                                   N, K, M
=============  ==============  ====================================  ==================================  ============
linear         forward         W                                     x, transposed                       Co, Ci, 1
linear         weight          dy                                    x                                   Co, 1, Ci
linear         input           dy                                    W                                   1, Co, Ci
convolution    forward         W                                     im2row(x), transposed               Co, K, HoWo
convolution    weight          dY                                    im2row(x)                           Co, HoWo, K
convolution    input           block_transpose(W)                    im2row_of_gradient(dY), transposed  Ci, K', HiWi
pointwise      forward         W                                     x                                   Co, Ci, HW
pointwise      weight          dY                                    x, transposed                       Co, HW, Ci
pointwise      input           transposed W                          dY                                  Ci, Co, HW
=============  ==============  ====================================  ==================================  ============

``K = Ci Hk Wk``, ``K' = Co Hk Wk``. Convolutions of G groups are G of them, depthwise ones those of one channel. In HWC
the image's matrix comes first, and columns are in the order of taps, then channels. Tensors are of one sample.
Source: github.com/pulp-platform/pulp-trainlib; strides and padding are in the transforms here.
"""

from __future__ import annotations

from torch import Tensor

from nybble.core.errors import UsageError
from nybble.microcontroller.arithmetic import Arithmetic
from nybble.microcontroller.transforms import Window, block_transpose, im2row, im2row_of_gradient, to_chw


def linear_forward(math: Arithmetic, x: Tensor, weight: Tensor) -> Tensor:
    """``[Ci]``, ``[Co, Ci]`` -> ``[Co]``."""
    return math.product(weight, x[None], transposed=True)[:, 0]


def linear_weight(math: Arithmetic, x: Tensor, dy: Tensor) -> Tensor:
    """``[Ci]``, ``[Co]`` -> ``[Co, Ci]``."""
    return math.product(dy[:, None], x[None], transposed=False)


def linear_input(math: Arithmetic, dy: Tensor, weight: Tensor) -> Tensor:
    """``[Co]``, ``[Co, Ci]`` -> ``[Ci]``."""
    return math.product(dy[None], weight, transposed=False)[0]


def pointwise_forward(math: Arithmetic, x: Tensor, weight: Tensor) -> Tensor:
    """``[Ci, H, W]``, ``[Co, Ci]`` -> ``[Co, H, W]``."""
    return math.product(weight, x.flatten(1), transposed=False).reshape(-1, *x.shape[1:])


def pointwise_weight(math: Arithmetic, x: Tensor, dy: Tensor) -> Tensor:
    """``[Ci, H, W]``, ``[Co, H, W]`` -> ``[Co, Ci]``."""
    return math.product(dy.flatten(1), x.flatten(1), transposed=True)


def pointwise_input(math: Arithmetic, dy: Tensor, weight: Tensor) -> Tensor:
    """``[Co, H, W]``, ``[Co, Ci]`` -> ``[Ci, H, W]``."""
    return math.product(weight.T, dy.flatten(1), transposed=False).reshape(-1, *dy.shape[1:])


def conv_forward(math: Arithmetic, x: Tensor, weight: Tensor, window: Window, groups: int = 1) -> Tensor:
    """``[Ci, H, W]``, ``[Co, Ci / groups, Hk, Wk]`` -> ``[Co, Ho, Wo]``.

    Raises:
        UsageError: channels that the groups don't divide.
    """
    rows = im2row(_grouped(x, groups), window)
    found = math.product(_grouped(weight, groups).flatten(2), rows, transposed=True)
    return found.reshape(-1, *window.out)


def conv_weight(math: Arithmetic, x: Tensor, dy: Tensor, window: Window, groups: int = 1) -> Tensor:
    """``[Ci, H, W]``, ``[Co, Ho, Wo]`` -> ``[Co, Ci / groups, Hk, Wk]``."""
    rows = im2row(_grouped(x, groups), window)
    found = math.product(_grouped(dy, groups).flatten(2), rows, transposed=False)
    return found.reshape(dy.shape[0], x.shape[0] // groups, *window.kernel)


def conv_input(math: Arithmetic, dy: Tensor, weight: Tensor, window: Window, groups: int = 1) -> Tensor:
    """``[Co, Ho, Wo]``, ``[Co, Ci / groups, Hk, Wk]`` -> ``[Ci, H, W]``."""
    rows = im2row_of_gradient(_grouped(dy, groups), window)
    turned = block_transpose(_grouped(weight, groups)).flatten(2)
    return math.product(turned, rows, transposed=True).reshape(-1, window.height, window.width)


def conv_forward_hwc(math: Arithmetic, x: Tensor, weight: Tensor, window: Window) -> Tensor:
    """``[H, W, Ci]``, ``[Co, Hk, Wk, Ci]`` -> ``[Ho, Wo, Co]``."""
    rows = _taps_first(im2row(to_chw(x), window), x.shape[-1])
    return math.product(rows, weight.flatten(1), transposed=True).reshape(*window.out, -1)


def conv_weight_hwc(math: Arithmetic, x: Tensor, dy: Tensor, window: Window) -> Tensor:
    """``[H, W, Ci]``, ``[Ho, Wo, Co]`` -> ``[Co, Hk, Wk, Ci]``; dY is transposed into a buffer of its own first."""
    rows = _taps_first(im2row(to_chw(x), window), x.shape[-1])
    turned = dy.flatten(0, 1).T.contiguous()
    return math.product(turned, rows, transposed=False).reshape(-1, *window.kernel, x.shape[-1])


def conv_input_hwc(math: Arithmetic, dy: Tensor, weight: Tensor, window: Window) -> Tensor:
    """``[Ho, Wo, Co]``, ``[Co, Hk, Wk, Ci]`` -> ``[H, W, Ci]``."""
    rows = _taps_first(im2row_of_gradient(to_chw(dy), window), dy.shape[-1])
    turned = block_transpose(to_chw(weight)).movedim(-3, -1).flatten(1)
    return math.product(rows, turned, transposed=True).reshape(window.height, window.width, -1)


def pointwise_forward_hwc(math: Arithmetic, x: Tensor, weight: Tensor) -> Tensor:
    """``[H, W, Ci]``, ``[Co, Ci]`` -> ``[H, W, Co]``."""
    return math.product(x.flatten(0, 1), weight, transposed=True).reshape(*x.shape[:2], -1)


def pointwise_weight_hwc(math: Arithmetic, x: Tensor, dy: Tensor) -> Tensor:
    """``[H, W, Ci]``, ``[H, W, Co]`` -> ``[Co, Ci]``; dY is transposed into a buffer of its own first."""
    return math.product(dy.flatten(0, 1).T.contiguous(), x.flatten(0, 1), transposed=False)


def pointwise_input_hwc(math: Arithmetic, dy: Tensor, weight: Tensor) -> Tensor:
    """``[H, W, Co]``, ``[Co, Ci]`` -> ``[H, W, Ci]``."""
    return math.product(dy.flatten(0, 1), weight, transposed=False).reshape(*dy.shape[:2], -1)


def _grouped(x: Tensor, groups: int) -> Tensor:
    if groups < 1 or x.shape[0] % groups:
        raise UsageError(f"{groups} groups don't divide {x.shape[0]} channels.")
    return x.reshape(groups, -1, *x.shape[1:])


def _taps_first(rows: Tensor, channels: int) -> Tensor:
    """Columns ``(C, taps)`` -> ``(taps, C)``."""
    return rows.reshape(*rows.shape[:-1], channels, -1).transpose(-1, -2).flatten(-2)
