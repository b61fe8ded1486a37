"""What images are pulled towards: the statistics that BatchNorms keep, smooth surfaces, small pixels.

    R_BN  = sum_l m_l (|mean_l(x) - running_mean_l| + |var_l(x) - running_var_l|)     Euclidean norms, not squared
    R_TV1 = sum over 4 directions of the mean of |x - shift(x)|
    R_TV2 = sum over 4 directions of the norm of x - shift(x)
    R_l2  = mean over images of the norm of an image

Liu et al. 2022, arXiv:2112.02086, section 3.1. Variances are biased ones (divided by the count), as theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nybble.core.errors import ModelError
from nybble.core.shapes import Float
from nybble.nn.in_place import evaluation_mode
from nybble.training.norms import running_norms


class NormDistance:
    """R_BN of the newest forward; the first BatchNorm counts ``first`` times."""

    def __init__(self, norms: list[_BatchNorm], first: float) -> None:
        self.norms, self.first = norms, first
        self._found: dict[int, Tensor] = {}

    def hook(self, number: int) -> Any:
        """What BatchNorm ``number`` calls before it runs."""

        def before(norm: Any, inputs: tuple[Tensor, ...]) -> None:
            self._found[number] = distance(inputs[0], norm.running_mean, norm.running_var)

        return before

    def total(self) -> Tensor:
        """A scalar with a gradient to what the network was called with."""
        parts = [found * (self.first if number == 0 else 1.0) for number, found in self._found.items()]
        self._found = {}
        return torch.stack(parts).sum()


def distance(x: Float[Tensor, "samples channels *size"], mean: Tensor, var: Tensor) -> Float[Tensor, ""]:
    """How far the mean and the biased variance of each channel are from others, as two norms; 0 has the gradient 0."""
    over = [0, *range(2, x.dim())]
    found_var, found_mean = torch.var_mean(x.float(), over, correction=0)
    norm = torch.linalg.vector_norm
    total: Tensor = norm(found_mean - mean) + norm(found_var - var)
    return total


@contextmanager
def watched(model: nn.Module, first: float) -> Iterator[NormDistance]:
    """Inside, the model is in eval mode, gathers no gradient, and its BatchNorms tell what they see.

    Raises:
        ModelError: it has no BatchNorm that keeps statistics.
    """
    norms = running_norms(model)
    if not norms:
        raise ModelError(
            f"{type(model).__name__} has no BatchNorm that keeps statistics of the images that it was trained on, so "
            "none can be made of it; take a convolutional classifier before its BatchNorms are folded."
        )
    learned = [(p, p.requires_grad) for p in model.parameters()]
    told = NormDistance(norms, first)
    hooks = [norm.register_forward_pre_hook(told.hook(number)) for number, norm in enumerate(norms)]
    try:
        for p, _ in learned:
            p.requires_grad_(False)
        with evaluation_mode(model):
            yield told
    finally:
        for p, wanted in learned:
            p.requires_grad_(wanted)
        for hook in hooks:
            hook.remove()


def variation(x: Float[Tensor, "samples channels height width"]) -> tuple[Tensor, Tensor]:
    """R_TV1 and R_TV2, scalars."""
    shifts = (
        x[..., :, 1:] - x[..., :, :-1], x[..., 1:, :] - x[..., :-1, :],
        x[..., 1:, 1:] - x[..., :-1, :-1], x[..., 1:, :-1] - x[..., :-1, 1:],
    )  # fmt: skip
    mean = torch.stack([shift.abs().mean() for shift in shifts]).sum()
    return mean, torch.stack([torch.linalg.vector_norm(shift) for shift in shifts]).sum()


def size(x: Float[Tensor, " samples *size"]) -> Float[Tensor, ""]:
    """R_l2."""
    found: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1).mean()
    return found


def soft_cross_entropy(logits: Float[Tensor, "samples classes"], chances: Tensor) -> Float[Tensor, ""]:
    """-sum p log softmax(logits), a mean over samples; of one-hot ``chances`` the usual cross-entropy."""
    return -(chances * logits.log_softmax(-1)).sum(-1).mean()
