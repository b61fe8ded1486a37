"""Channels of every head rotated by a Hadamard matrix, which spreads an outlier over all of them.

Ashkboos et al. 2024 (QuaRot), arXiv:2404.00456, section 4 (value and output projection): ``W_v`` becomes ``R W_v`` and
``W_o`` becomes ``W_o R^T`` inside each head. The residual stream is for the transform ``rotate``, the MLP's inner
activations, whose rotation needs work at run time, for ``online-rotation``. R is a Hadamard matrix over sqrt(width)
with random signs of its columns; where the width of a head is no power of two, blocks of its largest power-of-two
divisor are rotated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nybble.core.errors import SchemeError
from nybble.core.orthogonal import head_rotations
from nybble.models.adapter import Adapter, LinearFold
from nybble.transforms._folds import Channel
from nybble.transforms._mixing import Mixing, Places


@dataclass(frozen=True, kw_only=True)
class Hadamard(Mixing):
    """Options of the method.

    Attributes:
        signs: multiply the channels by random signs first, so that no pattern of theirs survives the rotation.
        block: channels of a head that are rotated among themselves; 0 means the largest power of two that divides it.
    """

    signs: bool = True
    block: int = 0

    def __post_init__(self) -> None:
        if self.block < 0:
            raise SchemeError(f"hadamard: block={self.block} is a number of channels, or 0.")

    def takes(self, fold: LinearFold) -> bool:  # noqa: D102
        return fold.heads

    def limits(self, adapter: Adapter, config: Any) -> list[str]:  # noqa: D102
        return ["only the channels between an attention's values and its output can be rotated"]

    def parameters(self, channel: Channel, places: Places, seed: int) -> dict[str, Tensor]:  # noqa: D102
        rotation = head_rotations(len(places.rows), places.rows.shape[1], self.block, self.signs, seed)
        return {"rotation": rotation.to(channel.largest.device)}


PART = Hadamard
