"""Where weights lie in the cells of their quantizer: codes, middles of cells, distances to the next one."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nybble.core.errors import SchemeError
from nybble.core.shapes import Bool, Float32, Integer
from nybble.learned import Learned
from nybble.nn.twin import FakeWeight
from nybble.ops.grid import Grid
from nybble.ops.rounding import decode, grid_table
from nybble.qtensor.block import BlockQTensor


def check_nearest(name: str, layer: str, weight: FakeWeight) -> None:
    """Raise SchemeError for a weight that isn't rounded to the nearest of its levels."""
    assert weight.learned is not None
    if not weight.learned.nearest:
        raise SchemeError(
            f"{layer}: callback {name} asks how far weights are from the next level, and {weight.learned.quantizer} is "
            "not rounded to the nearest one here; learn it by ste, lsq or statistics (without a threshold), or leave "
            "the callback out."
        )
    settled(name, layer, weight)


def settled(name: str, layer: str, weight: FakeWeight) -> BlockQTensor:
    """The weight in codes.

    Raises:
        SchemeError: it has none, or several kinds of them.
    """
    assert weight.learned is not None
    found = weight.learned.settle(weight.latent.detach())
    if not isinstance(found, BlockQTensor):
        raise SchemeError(
            f"{layer}: callback {name} compares codes, and {weight.learned.quantizer} has no code of its own for each "
            "weight; leave the callback out."
        )
    return found


def levels(fmt: str, codes: Integer[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """What codes stand for, in units of the scale."""
    found: Tensor = decode(codes, fmt)
    return found


@torch.no_grad()
def middles(learned: Learned, x: Float32[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """For each weight the one that is rounded without an error, and to the same level."""
    found = learned.settle(x)
    assert isinstance(found, BlockQTensor)
    removed = learned.removed(x)
    return found.dequantize() if removed is None else found.dequantize() + removed


@torch.no_grad()
def near_boundaries(learned: Learned, x: Float32[Tensor, "*shape"], within: float) -> Bool[Tensor, "*shape"]:
    """Which weights are near a place where rounding goes to another level.

    Args:
        learned: rounds to the nearest.
        x: the weight.
        within: the distance, in units of the gap between the two levels.
    """
    found, removed, near = learned.settle(x), learned.removed(x), []
    assert isinstance(found, BlockQTensor)

    def look(y: Tensor, grid: Grid) -> Tensor:
        near.append(_distances(y, grid) <= within)
        return grid.nearest(y)

    learned.quantizer.soft(x if removed is None else x - removed, found.params, look)
    return learned.quantizer.granularity.from_blocks(near[0], tuple(x.shape))


def _distances(y: Tensor, grid: Grid) -> Tensor:
    """From the nearest of the boundaries between levels, in units of the gap that it is in; float32 as ``y``."""
    gaps = grid_table(grid.format.name, y.device).diff()
    between = torch.from_numpy(np.array(grid.format.thresholds(grid.rounding))).to(y.device)
    y = y if grid.zero is None else y + grid.zero
    upper = torch.bucketize(y, between).clamp(max=len(between) - 1)
    lower = (upper - 1).clamp(min=0)
    return torch.minimum(*((y - between[at]).abs() / gaps[at] for at in (lower, upper)))
