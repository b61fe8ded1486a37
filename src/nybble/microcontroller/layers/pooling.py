"""Pooling: averages of patches side by side, the largest of any window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from nybble.microcontroller.arithmetic import Arithmetic
from nybble.microcontroller.layer import Layer, Parameters
from nybble.microcontroller.transforms import Window, im2row

LARGEST_WINDOW = 255
"""Places in a window of the largest, whose numbers are kept as bytes; the last byte value stands for none."""


@dataclass(frozen=True, kw_only=True)
class AveragePool(Layer):
    """Means over patches that tile the image.

    Attributes:
        patch: height and width.
    """

    patch: tuple[int, int]

    def forward(self, math: Arithmetic, held: Parameters, x: Sequence[Tensor]) -> Tensor:  # noqa: D102
        (high, wide), (c, ho, wo) = self.patch, self.out
        patches = x[0].reshape(c, ho, high, wo, wide).movedim(2, 3).flatten(3)
        return math.over(math.sum(patches), high * wide)

    def back(self, math: Arithmetic, held: Parameters, x: Sequence[Tensor], y: Tensor, dy: Tensor) -> list[Tensor]:  # noqa: D102
        each = math.over(dy, prod(self.patch))
        return [each.repeat_interleave(self.patch[0], 1).repeat_interleave(self.patch[1], 2)]

    @property
    def _c(self) -> str:
        return ", ".join(map(str, (*self.out, *self.patch)))

    def c_forward(self) -> str:  # noqa: D102
        return f"average_forward({self.data()}, {self.result}, {self._c});"

    def c_back(self, which: int, into: str) -> str:  # noqa: D102
        return f"average_input({self.gradient}, {into}, {self._c});"


@dataclass(frozen=True, kw_only=True)
class MaxPool(Layer):
    """The largest of each window, the first where several are; padding is never the largest.

    Attributes:
        window: of the pool, up to :data:`LARGEST_WINDOW` places.
    """

    window: Window

    def forward(self, math: Arithmetic, held: Parameters, x: Sequence[Tensor]) -> Tensor:  # noqa: D102
        seen = self._seen(x[0])
        return seen.gather(-1, seen.argmax(-1, keepdim=True)).reshape(self.out)  # the first, 0 and -0 being equal

    def back(self, math: Arithmetic, held: Parameters, x: Sequence[Tensor], y: Tensor, dy: Tensor) -> list[Tensor]:  # noqa: D102
        w, (c, ho, wo) = self.window, self.out
        chosen = self._seen(x[0]).argmax(-1).reshape(self.out)
        (high, wide), (down, across) = w.kernel, w.stride
        total = dy.new_zeros(c, w.height + sum(w.padding[:2]), w.width + sum(w.padding[2:]))
        # last place first: so a pixel of several windows gets their gradients in the order of the windows
        for place in reversed(range(high * wide)):
            i, j = divmod(place, wide)
            at = total[:, i : i + down * (ho - 1) + 1 : down, j : j + across * (wo - 1) + 1 : across]
            at.copy_(torch.where(chosen == place, at + dy, at))
        up, left = w.padding[0], w.padding[2]
        return [total[:, up : up + w.height, left : left + w.width].contiguous()]

    def _seen(self, x: Tensor) -> Tensor:
        """``[C, Ho * Wo, places]``, -inf in the padding."""
        up, down, left, right = self.window.padding
        padded = torch.nn.functional.pad(x, (left, right, up, down), value=float("-inf"))
        inner = Window(
            height=padded.shape[1], width=padded.shape[2], kernel=self.window.kernel, stride=self.window.stride
        )
        return im2row(padded[:, None], inner)

    def c_declarations(self) -> list[str]:  # noqa: D102
        w, (c, ho, wo) = self.window, self.out
        numbers = (c, w.height, w.width, c, ho, wo, *w.kernel, *w.stride, w.padding[0], w.padding[2], c)
        return [f"static const conv_shape {self.id}_shape = {{{', '.join(map(str, numbers))}}};"]

    def c_forward(self) -> str:  # noqa: D102
        return f"max_forward(&{self.id}_shape, {self.data()}, {self.result}, {self.id}_own);"

    def c_back(self, which: int, into: str) -> str:  # noqa: D102
        return f"max_input(&{self.id}_shape, {self.id}_own, {self.gradient}, {into});"

    @property
    def own_bytes(self) -> int:  # noqa: D102
        return prod(self.out)
