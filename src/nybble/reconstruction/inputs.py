"""What a step is fed: batches in an order that a seed decides, float inputs mixed in where the recipe says so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from nybble.calibration.trace import BlockCall
from nybble.calibration.window import Window
from nybble.core.seeds import derive_seed
from nybble.reconstruction import Reconstruction

Step = tuple[int, Sequence[BlockCall], dict[str, Tensor]]
"""A batch's number, how the window's blocks are called, and what the first is given."""


def rounds(window: Window, options: Reconstruction) -> Iterator[Step]:
    """``steps`` batches with their numbers: all of them in a random order, then again in another."""
    seed = window.calibration.seed
    generator = torch.Generator().manual_seed(derive_seed(seed, window.part, "order"))
    draws = torch.Generator(window.calibration.device).manual_seed(derive_seed(seed, window.part, "mix"))
    left = options.steps
    while left:
        order = torch.randperm(window.calibration.batches, generator=generator).tolist()[:left]
        left -= len(order)
        fed = window.inputs(options.feed, order=order)
        exact = window.inputs("float", order=order) if options.mix else None
        for number, (calls, given) in zip(order, fed, strict=True):
            found = dict(given)
            if exact is not None:
                found = mixed(found, next(exact)[1], options.mix, options.mix_by == "sample", draws)
            yield number, calls, found


def mixed(
    given: Mapping[str, Tensor], exact: Mapping[str, Tensor], share: float, whole: bool, draws: torch.Generator
) -> dict[str, Tensor]:
    """Inputs of which a share is another path's: QDrop's, Wei et al. 2022, arXiv:2203.05740.

    Args:
        given: of the quantized path, by name; only floating-point tensors are mixed.
        exact: of the float path.
        share: the chance of each element to be the float path's.
        whole: draw for samples (the first dimension) instead.
        draws: on the tensors' device.
    """
    found = dict(given)
    for name, tensor in given.items():
        other = exact.get(name)
        if other is not None and other.shape == tensor.shape and tensor.is_floating_point() and tensor.dim():
            shape = (len(tensor), *(1,) * (tensor.dim() - 1)) if whole else tuple(tensor.shape)
            drawn = torch.rand(shape, generator=draws, dtype=torch.float32, device=tensor.device) < share
            found[name] = torch.where(drawn, other, tensor)
    return found
