"""Embeddings whose table is a QTensor, and what reads the same table: an output head, another embedding."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from nybble.nn.packed import Packed
from nybble.nn.products import DEVICES, packed_rows
from nybble.qtensor import QTensor


def input_embedding(model: Any) -> nn.Module | None:
    """What a model calls its input embedding; None where it has none, or doesn't say."""
    try:
        found = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:
        return None
    return found if isinstance(getattr(found, "embedding_dim", None), int) else None


class RowScale(NamedTuple):
    """What the rows of a table are multiplied with once they are looked up.

    ``value``: the number. ``rounded``: to the rows' dtype before it multiplies, as Gemma's is.
    """

    value: float
    rounded: bool

    def times(self, rows: Tensor) -> Tensor:
        """The rows, scaled, in their dtype."""
        if not self.rounded:
            return rows * self.value
        return rows * torch.full((), self.value, dtype=rows.dtype, device=rows.device)


class PackedTable(Packed):
    """The table of an embedding."""

    def __getitem__(self, index: Any) -> Tensor:
        """A copy of some of the values, in :attr:`dtype`; what is written to it is lost.

        The initialisers of some families (Chinese CLIP) zero the padding row of a table that is loaded already.
        """
        assert self.dtype is not None
        rows: Tensor = self(self.dtype)[index]
        return rows


class QuantEmbedding(nn.Module):
    """``table[ids]``, the table dequantized in float32 and cast; times a number, where the float one has that.

    Args:
        weight: QTensor [tokens, width].
        dtype: of what comes out; ``.to(dtype)`` changes it.
        padding_idx: as ``nn.Embedding``'s; it matters to nothing but the representation.
        scale: what rows are multiplied with; None for nothing.
    """

    def __init__(
        self, weight: QTensor, dtype: torch.dtype, padding_idx: int | None = None, scale: RowScale | None = None
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.weight, self.padding_idx, self.scale = PackedTable(weight, dtype), padding_idx, scale

    @property
    def dtype(self) -> torch.dtype:
        """Of what comes out."""
        assert self.weight.dtype is not None
        return self.weight.dtype

    def how(self) -> tuple[bool, str]:
        """As :meth:`nybble.nn.linear.QuantLinear.how`."""
        return self.weight.how(packed_rows)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] -> [..., width]."""
        rows = self.weight.rows(ids, self.dtype)
        return rows if self.scale is None else self.scale.times(rows)

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.dtype}"


class TiedEmbedding(nn.Module):
    """``table[ids]`` with the table of another embedding, which alone stores it: an encoder's beside a decoder's.

    Args:
        embedding: whose table it reads.
        scale: its own.
        table: name of ``embedding`` in the model; empty where the model calls it its input embedding.
    """

    def __init__(self, embedding: QuantEmbedding, scale: RowScale | None = None, table: str = "") -> None:
        super().__init__()
        self._embedding, self.table = (embedding,), table  # in a tuple, so that its tensors aren't saved twice
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx, self.scale = embedding.padding_idx, scale

    @property
    def weight(self) -> Packed:
        """The table."""
        return self._embedding[0].weight

    def how(self) -> tuple[bool, str]:
        """As :meth:`nybble.nn.linear.QuantLinear.how`."""
        return self.weight.how(packed_rows)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] -> [..., width]."""
        rows = self.weight.rows(ids, self._embedding[0].dtype)
        return rows if self.scale is None else self.scale.times(rows)

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.num_embeddings}, {self.embedding_dim}, tied"


class TiedHead(nn.Module):
    """``x @ table.T + b`` with the table of an embedding, which alone stores it.

    Args:
        embedding: whose table it reads.
        bias: [tokens] or None.
        table: name of ``embedding`` in the model; empty where the model calls it its input embedding.
    """

    def __init__(self, embedding: QuantEmbedding, bias: Tensor | None = None, table: str = "") -> None:
        super().__init__()
        self._embedding, self.table = (embedding,), table  # in a tuple, so that its tensors aren't saved twice
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def weight(self) -> Packed:
        """The table."""
        return self._embedding[0].weight

    def how(self) -> tuple[bool, str]:
        """As :meth:`nybble.nn.linear.QuantLinear.how`."""
        return self.weight.how()

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., tokens]."""
        weight = self.weight
        here = x.device.type in DEVICES and weight.device == x.device
        if here and not ((torch.is_grad_enabled() and x.requires_grad) or weight.held(x.dtype) or weight.brought):
            return weight.linear(x, self.bias)
        return functional.linear(x, self.weight(x.dtype).to(x.device), self.bias)  # which may be another GPU's

    def extra_repr(self) -> str:  # noqa: D102
        return f"in_features={self.in_features}, out_features={self.out_features}, tied"
