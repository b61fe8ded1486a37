"""Embeddings whose table is a QTensor, and an output head that reads the same table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nybble.nn.packed import Packed
from nybble.qtensor import QTensor


def input_embedding(model: Any) -> nn.Module | None:
    """What a model calls its input embedding; None where it has none, or doesn't say."""
    try:
        found = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return found if isinstance(getattr(found, "embedding_dim", None), int) else None


class QuantEmbedding(nn.Module):
    """``table[ids]``, the table dequantized in float32 and cast.

    Args:
        weight: QTensor [tokens, width].
        dtype: of what comes out; ``.to(dtype)`` changes it.
        padding_idx: as ``nn.Embedding``'s; it matters to nothing but the representation.
    """

    def __init__(self, weight: QTensor, dtype: torch.dtype, padding_idx: int | None = None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.weight, self.padding_idx = Packed(weight, dtype), padding_idx

    @property
    def dtype(self) -> torch.dtype:
        """Of what comes out."""
        assert self.weight.dtype is not None
        return self.weight.dtype

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] -> [..., width]."""
        return functional.embedding(ids, self.weight(self.dtype))

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.dtype}"


class TiedHead(nn.Module):
    """``x @ table.T + b`` with the table of an embedding, which alone stores it.

    Args:
        embedding: whose table it reads.
        bias: [tokens] or None.
    """

    def __init__(self, embedding: QuantEmbedding, bias: Tensor | None = None) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple, so that its tensors aren't saved twice
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def weight(self) -> Packed:
        """The table."""
        return self._embedding[0].weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., tokens]."""
        return functional.linear(x, self.weight(x.dtype).to(x.device), self.bias)  # which may be another GPU's

    def extra_repr(self) -> str:  # noqa: D102
        return f"in_features={self.in_features}, out_features={self.out_features}, tied"
