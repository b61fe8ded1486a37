"""LET: channels of a block are scaled and shifted so that what is rounded is easy to round (OmniQuant).

    Y = X W + B:       x' = (x - delta) / s,   W' = diag(s) W,   B' = B + W^T delta        (row vectors)
    P = Q K^T:         Q' = Q / s_a,           K' = s_a K

Shao et al. 2023, "OmniQuant: Omnidirectionally Calibrated Quantization for Large Language Models", arXiv:2308.13137,
section 3.3. Places: a norm and what reads it (attention's and the MLP's), values and the output layer, queries and
keys; s and delta go into the norm (or rows) before and the columns behind, so that nothing is left at run time. A shift
passes attention unchanged, as the rows of its probabilities sum to one. Begins at

    s = max|X|^alpha / max|W|^(1 - alpha),     delta = (max X + min X) / 2,     s_a = 1

with W all weights that read the channel; learned together with LWC (``weights: clip``) and the rest of a window.

A factor is one for all channels that must share it: those of one value row that several query heads read (grouped-query
attention), the two that a rotary embedding mixes, in all query heads of a key head. Queries and keys are taken where
they are rounded (``outputs`` or ``matmuls`` of the scheme), as else nothing depends on their factor.

Where we differ: s is ``start exp(t)`` and delta ``start + half the channel's range t``, with t learned, so that one
rate fits channels of all sizes and s stays positive without being cut off. The range in the start of s is the shifted
channel's. delta is learned where all that makes and reads the channels has a bias, and left out elsewhere: no bias is
made, so that the file has what the model's config says; nowhere in a llama, then (the paper's code does the same), and
in an OPT everywhere. Extremes are those of all batches, not a running mean. With inputs of one static range, which was
calibrated before, s begins at 1 and delta at 0: put the transform ``smooth`` before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from nybble.core.errors import SchemeError
from nybble.learned.transforms import Extent, LearnedTransform, Moving, Place

LEAST, MOST = 1e-5, 1e5
"""Between these s begins; the paper's code has the first."""


class Equivalent(Moving):
    """See the module.

    Args:
        places: of one block.
        extents: of each.
        options: of the part.
    """

    def __init__(self, places: Sequence[Place], extents: Sequence[Extent | None] | None, options: Let) -> None:
        super().__init__(places)
        self._asked = options.shift
        self._shifted = [options.shift and place.shifts for place in places]
        for number, place in enumerate(places):
            units, device = int(place.units.max()) + 1, place.units.device
            extent = None if extents is None else extents[number]
            start = torch.ones(units, dtype=torch.float32, device=device)
            middle, reach = torch.zeros_like(start), torch.ones_like(start)
            if extent is not None:
                low, high = _by_unit(extent.lowest, place.units, "amin"), _by_unit(extent.highest, place.units, "amax")
                reach = _usable((high - low) / 2)
                if not place.static:
                    middle = (high + low) / 2 if self._shifted[number] else middle
                    largest = torch.maximum((high - middle).abs(), (low - middle).abs())
                    start = first_factor(largest, _by_unit(extent.behind, place.units, "amax"), options.alpha)
            self.register_buffer(f"start_{number}", start)
            self.register_parameter(f"scale_{number}", nn.Parameter(torch.zeros_like(start)))
            if self._shifted[number]:
                self.register_buffer(f"middle_{number}", middle)
                self.register_buffer(f"reach_{number}", reach)
                self.register_parameter(f"shift_{number}", nn.Parameter(torch.zeros_like(start)))

    def parameters_of(self, number: int) -> dict[str, Tensor]:
        """``factor`` and, where the channels are shifted, ``shift``; float32 [channels]."""
        units = self.places[number].units
        factor = self.get_buffer(f"start_{number}") * self.get_parameter(f"scale_{number}").exp()
        found = {"factor": factor[units]}
        if self._shifted[number]:
            moved = self.get_buffer(f"reach_{number}") * self.get_parameter(f"shift_{number}")
            found["shift"] = (self.get_buffer(f"middle_{number}") + moved)[units]
        return found

    def told(self, names: Sequence[str]) -> str:
        """Which places are scaled, and which of them shifted too."""
        words = {True: "scaled and shifted", False: "scaled" + (" (no biases to shift)" if self._asked else "")}
        pairs = zip(self.places, self._shifted, strict=True)
        return ", ".join(f"{place.name} {words[both]}" for place, both in pairs if place.name in names)

    def groups(self) -> dict[str, list[nn.Parameter]]:  # noqa: D102
        return {"transform": list(self.parameters())} if self.places else {}


def first_factor(largest: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """``s`` to begin with; 1 for channels without input or without weight. float32 [channels] each."""
    found = largest**alpha / weight ** (1 - alpha)
    usable = (largest > 0) & (weight > 0) & torch.isfinite(found) & (found > 0)
    return torch.where(usable, found, torch.ones_like(found)).clamp(LEAST, MOST)


def _by_unit(values: Tensor, units: Tensor, reduce: str) -> Tensor:
    """The smallest or largest value among the channels of each unit."""
    empty = values.new_zeros(int(units.max()) + 1)
    return empty.scatter_reduce(0, units, values, reduce, include_self=False)


def _usable(reach: Tensor) -> Tensor:
    return torch.where(torch.isfinite(reach) & (reach > 0), reach, torch.ones_like(reach))


@dataclass(frozen=True, kw_only=True)
class Let(LearnedTransform):
    """Options of the method.

    Attributes:
        alpha: share of the inputs' range that moves into the weights at the start, 0 .. 1.
        shift: also shift channels, where biases allow it.
        where: ``rounded``: places whose channels the scheme rounds; ``auto``: those, and those that can be shifted (the
            paper: with weights alone LET is for OPT, not for LLaMA); ``all``: every place but queries and keys that
            nothing rounds.
        down: also between the MLP's up and down layers, where a family has that pair. The paper leaves it out, as what
            comes in there is sparse and its gradients unsteady.
    """

    alpha: float = 0.5
    shift: bool = True
    where: Literal["auto", "rounded", "all"] = "auto"
    down: bool = False

    groups = ("transform",)

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise SchemeError(f"let: alpha={self.alpha:g} is a share, 0 <= alpha <= 1.")

    def takes(self, place: Place) -> bool:  # noqa: D102
        if place.kind == "product" or place.rounded:
            return place.rounded and (place.kind != "linear" or self.down)
        if place.kind == "linear" and not self.down:
            return False
        return self.where == "all" or (self.where == "auto" and self.shift and place.shifts)

    def begin(self, places: Sequence[Place], extents: Sequence[Extent | None] | None) -> Moving:  # noqa: D102
        return Equivalent(places, extents, self)


PART = Let
