"""Norms of whole tensors, by which layer-wise optimizers scale a step."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped(p: Tensor, update: Tensor, most: float) -> Tensor | float:
    """``min(1, most * |p| / |update|)``, float32; 1 where ``most`` is 0."""
    if most == 0:
        return 1.0
    size, moved = torch.linalg.vector_norm(p), torch.linalg.vector_norm(update)
    return torch.where(moved > most * size, most * size / moved, 1.0)
