"""Counts weights that flip between two codes, and puts those that do so often into the middle of their cell.

A code that changes in the direction opposite to its change before is one oscillation (Nagel et al. 2022, "Overcoming
Oscillations in Quantization-Aware Training", arXiv:2203.11086, section 3). Late in training such weights lie at the
boundary between two codes, where a straight-through gradient drives them to and fro.

The cure: every ``reset_every`` updates a weight that has oscillated ``reset_at`` times or more since the last of these
becomes the level that it is rounded to, half a cell from both boundaries; what the network computes stays the same
(OsciReset of TetraJet-v2, Chen et al. 2025, arXiv:2510.27527). Where we differ: theirs judges by the path of the
rounded weight over that of the float one; here it is the count, which needs no float32 beside each weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nybble.core.errors import SchemeError
from nybble.learned import Learned
from nybble.nn.twin import FakeWeight
from nybble.training.callbacks import Acting, Callback, rounded_weights
from nybble.training.callbacks._cells import check_nearest, levels, middles, settled

NAME = "oscillation"
_MOST = torch.iinfo(torch.int16).max


class Flips(nn.Module):
    """What is remembered of a weight, in its state dict.

    Args:
        codes: at the start; uint8, or int32 above 8 bits.
    """

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes.clone())
        self.register_buffer("direction", torch.zeros_like(codes, dtype=torch.int8))  # of the newest change
        self.register_buffer("recent", torch.zeros_like(codes, dtype=torch.int16))  # since the last reset
        for name in ("updates", "newest", "total", "resets"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64, device=codes.device))

    def count(self, codes: Tensor, fmt: str) -> None:
        """An update has come to these codes."""
        change = (levels(fmt, codes) - levels(fmt, self.get_buffer("codes"))).sign().to(torch.int8)
        direction, recent = self.get_buffer("direction"), self.get_buffer("recent")
        flipped = change * direction < 0
        direction.copy_(torch.where(change == 0, direction, change))
        recent.copy_((recent + flipped).clamp(max=_MOST))
        self.get_buffer("codes").copy_(codes)
        self.get_buffer("updates").add_(1)
        self.get_buffer("newest").copy_(flipped.sum())
        self.get_buffer("total").add_(flipped.sum())

    def cured(self, often: int) -> Tensor:
        """Which weights are to be reset, bool; they, and all others, are counted from 0 again."""
        recent = self.get_buffer("recent")
        found = recent >= often
        recent.zero_()
        self.get_buffer("direction").masked_fill_(found, 0)
        self.get_buffer("resets").add_(found.sum())
        return found

    def number(self, name: str) -> int:
        """A count; waits for the device."""
        return int(self.get_buffer(name))


class Counting(Acting):
    """See the module.

    Args:
        weights: by name, each with :class:`Flips` as ``oscillation``. options: of the callback.
    """

    def __init__(self, weights: Mapping[str, FakeWeight], options: Oscillation) -> None:
        self.weights, self.options = weights, options

    @property
    def _flips(self) -> dict[str, Flips]:
        found = {name: weight.get_submodule(NAME) for name, weight in self.weights.items()}
        return {name: flips for name, flips in found.items() if isinstance(flips, Flips)}

    @torch.no_grad()
    def after_update(self, progress: float) -> None:  # noqa: D102
        every = self.options.reset_every
        updates = next(iter(self._flips.values())).number("updates") + 1  # of a checkpoint that was read since, too
        for name, flips in self._flips.items():
            weight = self.weights[name]
            found = settled(NAME, name, weight)
            flips.count(found.unpacked(), found.format.name)
            if every and not updates % every:
                assert isinstance(weight.learned, Learned)
                reset = flips.cured(self.options.reset_at)
                weight.latent.copy_(torch.where(reset, middles(weight.learned, weight.latent.detach()), weight.latent))

    def newest(self) -> dict[str, float]:
        """``flips``: of all weights together."""
        return {"flips": sum(flips.number("newest") for flips in self._flips.values())}

    def layers(self) -> dict[str, dict[str, float]]:
        """``weights``, ``flips`` in all updates, ``resets``."""
        return {
            name: {
                "weights": self.weights[name].latent.numel(), "flips": flips.number("total"),
                "resets": flips.number("resets"),
            }
            for name, flips in self._flips.items()
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Oscillation(Callback):
    """See the module.

    Attributes:
        reset_every: updates from one cure to the next; 0 only counts.
        reset_at: oscillations in that time from which on a weight is reset.
    """

    reset_every: int = 0
    reset_at: int = 4

    def __post_init__(self) -> None:
        if self.reset_every < 0:
            raise SchemeError(
                f"oscillation: reset_every={self.reset_every} is a number of updates; 0 counts and resets nothing."
            )
        if self.reset_at < 1:
            raise SchemeError(f"oscillation: reset_at={self.reset_at} is a number of oscillations; give 1 or more.")
        if 0 < self.reset_every <= self.reset_at:
            raise SchemeError(
                f"oscillation: no weight oscillates {self.reset_at} times in {self.reset_every} updates, whose first "
                f"change is none; give a reset_every above {self.reset_at}, or a smaller reset_at."
            )

    def attach(self, model: nn.Module) -> Counting:  # noqa: D102
        weights = rounded_weights(model, NAME)
        for name, weight in weights.items():
            if self.reset_every:
                check_nearest(NAME, name, weight)
            if NAME not in weight._modules:
                weight.add_module(NAME, Flips(settled(NAME, name, weight).unpacked()))
        return Counting(weights, self)


PART = Oscillation
