"""Shape transforms that make matrix products of convolutions: one channel group after another, CHW or HWC."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from nybble.core.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Window:
    """How a kernel moves over an image, or a pool does.

    Attributes:
        height, width: of the image. kernel: its height and width. stride: down and across.
        padding: rows above and below, columns left and right.

    Raises:
        UsageError: a stride that doesn't divide what it has to move over.
    """

    height: int
    width: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)

    def __post_init__(self) -> None:
        _ = self.out

    @property
    def out(self) -> tuple[int, int]:
        """Height and width of the output: ``(in - kernel + padding + stride) / stride``, which must be whole.

        A kernel of one row needs no more of it than that the last step starts within the image.
        """
        up, down, left, right = self.padding
        return (
            _steps(self.height, self.kernel[0], self.stride[0], up + down, "rows"),
            _steps(self.width, self.kernel[1], self.stride[1], left + right, "columns"),
        )


def fitting(
    height: int, width: int, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int, int, int]
) -> Window:
    """A window without the far padding that no step of it reaches: frameworks round down, here nothing is left over."""
    up, down, left, right = padding
    down -= min((height + up + down - kernel[0]) % stride[0], down)
    right -= min((width + left + right - kernel[1]) % stride[1], right)
    return Window(height=height, width=width, kernel=kernel, stride=stride, padding=(up, down, left, right))


def _steps(size: int, kernel: int, stride: int, padding: int, what: str) -> int:
    if min(size, kernel, stride) < 1 or padding < 0:
        raise UsageError(f"{size} {what}, a kernel of {kernel}, a stride of {stride}: each must be 1 or more.")
    over = size + padding - kernel
    if over < 0:
        raise UsageError(f"a kernel of {kernel} doesn't fit into {size} {what} with {padding} of padding.")
    if over % stride and kernel > 1:
        raise UsageError(
            f"a stride of {stride} doesn't divide the {over} {what} that a kernel of {kernel} moves over ({size} with "
            f"{padding} of padding): {over % stride} are never read. Pad by {stride - over % stride} more, or crop."
        )
    return over // stride + 1


def im2row(x: Tensor, window: Window) -> Tensor:
    """What each step of a kernel sees, as rows.

    Args:
        x: ``[..., C, H, W]``.
        window: of the kernel.

    Returns:
        ``[..., Ho * Wo, C * Hk * Wk]``.
    """
    (rows, columns), (hk, wk), (down, across) = window.out, window.kernel, window.stride
    up, below, left, right = window.padding
    padded = functional.pad(x, (left, right, up, below))
    seen = [
        padded[..., i : i + down * (rows - 1) + 1 : down, j : j + across * (columns - 1) + 1 : across]
        for i in range(hk)
        for j in range(wk)
    ]
    stacked = torch.stack(seen, -1)  # [..., C, Ho, Wo, Hk * Wk]
    return stacked.movedim(-4, -2).reshape(*x.shape[:-3], rows * columns, -1)


def im2row_of_gradient(dy: Tensor, window: Window) -> Tensor:
    """The second mode: what each pixel of the input was part of, with the flipped kernel's taps in order.

    Steps of more than one leave zeros between the gradients, and the padding is the rest of a full one.

    Args:
        dy: ``[..., Co, Ho, Wo]``.
        window: of the forward kernel.

    Returns:
        ``[..., H * W, Co * Hk * Wk]``, zeros where the kernel was outside the output.
    """
    (rows, columns), (hk, wk), (down, across) = window.out, window.kernel, window.stride
    spread = dy.new_zeros(*dy.shape[:-2], (rows - 1) * down + 1, (columns - 1) * across + 1)
    spread[..., ::down, ::across] = dy
    up, left = hk - 1 - window.padding[0], wk - 1 - window.padding[2]
    below = window.height + hk - 1 - up - spread.shape[-2]
    right = window.width + wk - 1 - left - spread.shape[-1]
    full = functional.pad(spread, (left, right, up, below))  # negative ones crop
    return im2row(full, Window(height=full.shape[-2], width=full.shape[-1], kernel=window.kernel))


def block_transpose(weight: Tensor) -> Tensor:
    """``[..., Co, Ci, Hk, Wk]`` -> ``[..., Ci, Co, Hk, Wk]``, taps flipped; twice, it is what it was."""
    return weight.transpose(-4, -3).flip(-2, -1)


def to_hwc(x: Tensor) -> Tensor:
    """``[..., C, H, W]`` -> ``[..., H, W, C]``."""
    return x.movedim(-3, -1)


def to_chw(x: Tensor) -> Tensor:
    """``[..., H, W, C]`` -> ``[..., C, H, W]``."""
    return x.movedim(-1, -3)
