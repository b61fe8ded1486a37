"""An embedding for optimizers with few bits: Xavier's start, a LayerNorm behind it, 32-bit states.

Dettmers et al. 2022, arXiv:2110.02861, section 2.3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nybble.optim._embeddings import mark_wide


class StableEmbedding(nn.Embedding):
    """``nn.Embedding`` whose rows are normalized before anything is added to them.

    The optimizers of :mod:`nybble.optim` keep float32 states of its table, also where they are given bare parameters.
    The norm is calculated in torch's default dtype, its output has the table's.

    Args:
        num_embeddings: rows of the table.
        embedding_dim: columns.
        padding_idx: a row that is 0 and stays so.
        options: ``max_norm``, ``norm_type``, ``scale_grad_by_freq``, ``device``, ``dtype``, as ``nn.Embedding`` takes
            them. Sparse gradients are of no use to these optimizers.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, **options: Any) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, **options)
        self.norm = nn.LayerNorm(embedding_dim, device=options.get("device"))
        mark_wide(self.weight)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy's table is marked as well."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's has no types
        mark_wide(self.weight)

    def reset_parameters(self) -> None:
        """Xavier's uniform start: smaller than the normal one of ``nn.Embedding``, and without its extremes."""
        nn.init.xavier_uniform_(self.weight)
        if self.padding_idx is not None:
            with torch.no_grad():
                self.weight[self.padding_idx].zero_()

    def forward(self, input: Tensor) -> Tensor:
        """Normalized rows of the tokens in ``input``: its shape, and ``embedding_dim``."""
        rows = functional.embedding(
            input, self.weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
        )
        normalized: Tensor = self.norm(rows.to(torch.get_default_dtype()))
        return normalized.to(self.weight.dtype)
