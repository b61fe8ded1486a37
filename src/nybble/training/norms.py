"""BatchNorms measured anew behind the last update: their running statistics are of weights that moved on since.

    mean, var  of all batches alike, each through the network as its file will compute

In few bits a small step of a weight can be a whole level of what is multiplied, so the averages that training leaves
lag behind. Nagel et al. 2022, "Overcoming Oscillations in Quantization-Aware Training", arXiv:2203.11086, section 5.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from nybble.core.errors import SchemeError
from nybble.nn.in_place import evaluation_mode


def running_norms(model: nn.Module) -> list[_BatchNorm]:
    """BatchNorms that keep statistics of what they have seen."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def check_norms(model: nn.Module) -> None:
    """Raise SchemeError where a network has nothing to measure anew."""
    if not running_norms(model):
        raise SchemeError(
            f"norm_batches measures BatchNorms anew, and {type(model).__name__} has none that keep statistics; leave it"
            " out."
        )


@torch.no_grad()
def measure_norms(model: nn.Module, run: Callable[[nn.Module], object]) -> None:
    """Give every BatchNorm the mean and variance of what it now sees.

    Args:
        model: everything else in it is in eval mode while it runs.
        run: calls the model on one batch or more, which all count alike.
    """
    norms = running_norms(model)
    with evaluation_mode(model), _averaging(norms):
        for norm in norms:
            norm.reset_running_stats()
        run(model)


@contextmanager
def _averaging(norms: list[_BatchNorm]) -> Iterator[None]:
    """Inside they take the mean of all batches, outside the running one that they had."""
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = None
    try:
        yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum
