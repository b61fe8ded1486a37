"""Fused expert weights ([experts, out, in] in one parameter) as one QTensor an expert."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nybble.nn.packed import Packed
from nybble.qtensor import QTensor


class PackedExperts(nn.Module):
    """Stands where a fused parameter stood: ``module.gate_up_proj[e]`` dequantizes expert e's matrix.

    Args:
        experts: a QTensor [out, in] for each expert.
        dtype: of the matrices that come out; ``.to(dtype)`` changes it.
        transposed: the model keeps [in, out], so that is what comes out.
    """

    def __init__(self, experts: Sequence[QTensor], dtype: torch.dtype, *, transposed: bool = False) -> None:
        super().__init__()
        self.transposed = transposed
        self.experts = nn.ModuleList(Packed(expert, dtype) for expert in experts)

    @property
    def _first(self) -> Packed:
        first = self.experts[0]
        assert isinstance(first, Packed)
        return first

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrices that come out."""
        assert self._first.dtype is not None
        return self._first.dtype

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self._first.device

    @property
    def shape(self) -> torch.Size:
        """Of the fused parameter."""
        rows, columns = self._first.shape
        return torch.Size((len(self.experts), *((columns, rows) if self.transposed else (rows, columns))))

    def __getitem__(self, expert: int | Tensor) -> Tensor:
        matrix: Tensor = self.experts[int(expert)](self.dtype)
        return matrix.T if self.transposed else matrix
