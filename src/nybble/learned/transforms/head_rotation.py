"""Rotations inside the heads that a window learns: values turn on their way to the output layer, and back (SpinQuant).

    W_v' = R W_v,      W_o' = W_o R^T       inside each key/value head; R = P(I + A) R_0,   A = a - a^T learned

The R2 of Liu et al. 2024, "SpinQuant: LLM Quantization with Learned Rotations", arXiv:2405.16406, learned by a block's
output error (as FlatQuant, Sun et al. 2024, arXiv:2410.09426, learns its affine maps) instead of the whole network's
loss, together with whatever else of a window learns; the transform ``learned-rotation`` has the latter. P is the
nearest orthogonal matrix (:func:`nybble.core.stiefel.turned`), so that any optimizer of the engine moves R on the
orthogonal ones. Folded into both layers: nothing is left at run time. R_0 is a Hadamard matrix, or with ``start:
identity`` what came (behind the transform ``hadamard`` its rotation); with inputs of one static range, which was
calibrated before, it is always the latter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from nybble.core.errors import SchemeError, within
from nybble.core.orthogonal import check_block, head_rotations
from nybble.core.stiefel import block_diagonal, turned
from nybble.learned.transforms import Extent, Function, Heads, LearnedTransform, Moving, Place


class Turning(Moving):
    """See the module.

    Args:
        places: of one block, with heads.
        options: of the part.
    """

    def __init__(self, places: Sequence[Place], options: HeadRotation) -> None:
        super().__init__(places)
        for number, place in enumerate(places):
            heads, device = _heads(place), place.units.device
            size = options.block or heads.width
            start = torch.eye(heads.width).expand(heads.count, -1, -1)
            if options.start == "hadamard" and not place.static:
                start = head_rotations(heads.count, heads.width, options.block, False, 0)
            free = torch.zeros(heads.count, heads.width // size, size, size, dtype=torch.float32, device=device)
            self.register_buffer(f"start_{number}", start.contiguous().to(device))
            self.register_parameter(f"turn_{number}", nn.Parameter(free))

    def parameters_of(self, number: int) -> dict[str, Tensor]:
        """``rotation``, float32 [heads, width, width]."""
        free = self.get_parameter(f"turn_{number}")
        return {"rotation": block_diagonal(turned(free - free.mT)) @ self.get_buffer(f"start_{number}")}

    def function_of(self, place: Place) -> Function:  # noqa: D102
        return _heads(place).function

    def turned(self, place: Place, x: Tensor, given: Mapping[str, Tensor]) -> Tensor:  # noqa: D102
        return _heads(place).turned(x, given["rotation"])

    def told(self, names: Sequence[str]) -> str:
        """Which places are rotated."""
        found = [place for place in self.places if place.name in names]
        return ", ".join(f"{place.name} rotated inside {_heads(place).count} heads" for place in found)

    def groups(self) -> dict[str, list[nn.Parameter]]:  # noqa: D102
        return {"rotation": list(self.parameters())} if self.places else {}


def _heads(place: Place) -> Heads:
    assert place.heads is not None
    return place.heads


@dataclass(frozen=True, kw_only=True)
class HeadRotation(LearnedTransform):
    """Options of the method.

    Attributes:
        start: the rotation that it begins with: a ``hadamard`` matrix, or none, the ``identity``.
        block: channels of a head that are rotated among themselves (those of one scale, say); 0 rotates all of it.
    """

    start: Literal["hadamard", "identity"] = "hadamard"
    block: int = 0

    groups = ("rotation",)
    inside_heads = True

    def __post_init__(self) -> None:
        if self.block < 0:
            raise SchemeError(f"head-rotation: block={self.block} is a number of channels, or 0.")

    def check_heads(self, width: int) -> None:  # noqa: D102
        with within("head-rotation"):
            check_block(
                "block", self.block, width, "of a head", "hadamard" if self.start == "hadamard" else "orthogonal"
            )

    def takes(self, place: Place) -> bool:  # noqa: D102
        return place.heads is not None

    def begin(self, places: Sequence[Place], extents: Sequence[Extent | None] | None) -> Moving:  # noqa: D102
        return Turning(places, self)


PART = HeadRotation
