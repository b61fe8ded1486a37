"""What a model loses: the loss whose gradients and curvature are measured, and how far one output is from another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nybble.calibration.fisher import log_likelihood
from nybble.data.kinds import Batch


def next_token(output: Any, batch: Batch) -> Tensor:
    """Mean cross-entropy of the data's own next tokens, in nats."""
    ids = batch.inputs["input_ids"]
    logits = output.logits[:, :-1].float().flatten(0, 1)
    labels = ids[:, 1:].flatten()
    if batch.real is not None:
        kept = batch.real[:, 1:].flatten()
        logits, labels = logits[kept], labels[kept]
    return torch.nn.functional.cross_entropy(logits, labels)


def own_labels(output: Any, batch: Batch) -> Tensor:
    """Mean negative log likelihood of labels drawn from the model itself, the same ones each time.

    Its expected Hessian is the Fisher information (:mod:`nybble.calibration.fisher`); data without labels will do.
    """
    found: Tensor = output.logits if getattr(output, "logits", None) is not None else output.last_hidden_state
    rows = found[..., 0].numel() if batch.real is None or found.dim() < 3 else int(batch.real.sum())
    generator = torch.Generator(found.device).manual_seed(0)
    return -log_likelihood(output, batch.real, generator) / max(1, rows)


def divergence(reference: Tensor, output: Any, real: Tensor | None) -> tuple[float, int]:
    """KL divergence from the float model's predictions in nats, summed, and over how many predictions.

    A model without logits is a Gaussian of unit variance around its hidden states: half the squared distance.

    Args:
        reference: what :func:`answer` gave of the float model's output.
        output: the changed model's.
        real: bool [samples, tokens], which tokens are no padding.
    """
    found, logits = answer(output).float(), getattr(output, "logits", None) is not None
    was = reference.float()
    if logits:
        p, q = torch.log_softmax(was, -1), torch.log_softmax(found, -1)
        each = (p.exp() * (p - q)).sum(-1)
    else:
        each = (was - found).square().sum(-1) / 2
    if real is not None and each.shape == real.shape:
        each = each[real]
    return float(each.double().sum()), each.numel()


def answer(output: Any) -> Tensor:
    """Logits, or hidden states of a model without."""
    logits: Tensor | None = getattr(output, "logits", None)
    hidden: Tensor = output.last_hidden_state if logits is None else logits
    return hidden
