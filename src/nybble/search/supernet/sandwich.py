"""The sandwich rule: each update learns from the largest, the smallest and random architectures of a supernet.

Yu and Huang 2019 (arXiv:1903.05134), as HAT and Mixture-of-Supernets use it: the gradients add up before one step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nybble.search.evolution import Encoding
from nybble.search.supernet.net import Supernet
from nybble.training.objective import Objective


class Sandwich(Objective):
    """The sum of an objective over architectures; random ones are drawn from torch's global state.

    nybble's loop seeds that by the update's number, so a run that is gone on with draws the same.

    Attributes:
        between: random architectures an update.
    """

    between: int = 1

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], progress: float) -> Tensor:
        """The loss of a batch, summed over the update's architectures; ``model`` is a :class:`Supernet`."""
        supernet: Any = model
        space = supernet.space
        chosen = [space.largest, space.smallest, *(drawn(supernet) for _ in range(self.between))]
        found = []
        for encoding in chosen:
            with supernet.running(encoding):
                found.append(super().__call__(model, batch, progress))
        return torch.stack(found).sum()


def drawn(supernet: Supernet) -> Encoding:
    """An architecture of the space at random, each gene alike."""
    return tuple(int(torch.randint(size, (1,))) for size in supernet.space.sizes)
