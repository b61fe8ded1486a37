"""How far an output is from a target: the errors that losses are made of, all float32 and differentiable."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

LEAST = 1e-4
"""The smallest cosine that has a logarithm here."""


def real_rows(output: Tensor, wanted: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both in float32; where they have rows for tokens, without those of padding (``mask``: bool, which are real)."""
    output, wanted = output.float(), wanted.float()
    if mask is not None and output.shape[:2] == mask.shape:
        output, wanted = output[mask], wanted[mask]
    return output, wanted


def real_vectors(output: Tensor, wanted: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same as [vectors, features]: a token each, or of images [samples, channels, rows, columns] a place each."""
    output, wanted = real_rows(output, wanted, mask)
    if output.dim() == 4:
        output, wanted = output.movedim(1, -1), wanted.movedim(1, -1)
    return output.reshape(-1, output.shape[-1]), wanted.reshape(-1, wanted.shape[-1])


def relative(output: Tensor, wanted: Tensor) -> Tensor:
    """``|y - y_float|^2 / |y_float|^2``; 0 where all is 0."""
    return (output - wanted).square().sum() / wanted.square().sum().clamp(min=1e-20)


def angle(output: Tensor, wanted: Tensor) -> Tensor:
    """``-log cos(y, y_float)``, a mean over vectors whose target isn't 0; a cosine below :data:`LEAST` counts as it."""
    cosine = functional.cosine_similarity(output, wanted, -1).clamp(min=LEAST)
    real = wanted.abs().amax(-1) > 0
    return -torch.where(real, cosine.log(), 0.0).sum() / real.sum().clamp(min=1)


def distance_and_divergence(output: Tensor, wanted: Tensor) -> Tensor:
    """``|h1 - h2|^2 + KL(softmax h1 || softmax h2)``, h1 the target; sums over features, a mean over vectors."""
    apart = (output - wanted).square().sum(-1)
    log_wanted, log_output = torch.log_softmax(wanted, -1), torch.log_softmax(output, -1)
    divergence = (log_wanted.exp() * (log_wanted - log_output)).sum(-1)
    return (apart + divergence).mean()
