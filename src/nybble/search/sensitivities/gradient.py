"""Squared gradient x squared error of each weight: the diagonal of the (empirical) Fisher information, one pass.

The loss's second-order term with the Fisher information for the Hessian; its first order vanishes at a minimum
(Kim et al. 2023, SqueezeLLM, arXiv:2306.07629, section 4.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nybble.core.errors import DataError
from nybble.core.progress import task
from nybble.search.sensitivities import Sensitivity
from nybble.search.study import Study


@dataclass(frozen=True, kw_only=True)
class Gradient(Sensitivity):
    """``sum(E[g^2] (Q(w) - w)^2) / 2``, in nats; the mean is over batches, most often of one sample each."""

    differentiates: ClassVar[bool] = True

    def measure(self, study: Study) -> Tensor:  # noqa: D102
        if not study.batches:
            raise DataError("gradients are of a loss on data, and there is none.")
        squares: dict[str, Tensor] = {}
        with study.differentiable(), task(study.progress, len(study.batches), "gradients of batches") as bar:
            for batch in study.batches:
                for name, gradient in study.gradients(batch).items():
                    squared = gradient.detach().float().square()
                    squares[name] = squares[name].add_(squared) if name in squares else squared
                bar.advance()
        rows = []
        for layer in study.layers:
            weights = study.matrices(layer, squares)
            found = [
                (weights * study.change(layer, item).square()).sum(dtype=torch.float64)
                for item in range(len(layer.menu))
            ]
            rows.append(torch.stack(found).cpu() / (2 * len(study.batches)))
        return torch.stack(rows)


PART = Gradient
