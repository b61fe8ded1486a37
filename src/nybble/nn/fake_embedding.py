"""The trainable twins of embeddings, and of heads and other embeddings that read the same table.

One latent table is looked up and multiplied with; the gradients of all that read it add up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nybble.learned import Learned
from nybble.nn.embedding import QuantEmbedding, RowScale, TiedEmbedding, TiedHead
from nybble.nn.kinds.tied import quantized_table, row_scale, untie
from nybble.nn.swap import set_module
from nybble.nn.twin import FakeWeight, Twin


class FakeEmbedding(Twin):
    """Stands for an embedding: ``table[ids]`` of a table that is rounded, times a number where the float one has that.

    Args:
        like: the float embedding; its table is copied.
        weights: learned quantizer of the table.
    """

    dtype: torch.dtype

    def __init__(self, like: Any, weights: Learned) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = like.weight.shape
        self.weight = FakeWeight(like.weight.detach().float().clone(), weights, trainable=True)
        self.dtype, self.padding_idx, self.scale = like.weight.dtype, like.padding_idx, row_scale(like)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] -> [..., width]."""
        return looked_up(self, ids, self.padding_idx, self.scale)

    def learned(self) -> list[tuple[str, Learned]]:  # noqa: D102
        return [] if self.weight.learned is None else [("weights", self.weight.learned)]

    def float_values(self) -> dict[str, Tensor]:  # noqa: D102
        return {"weight": self.weight.latent.detach()}

    def settle_in(self, root: nn.Module, name: str) -> None:  # noqa: D102
        settled = QuantEmbedding(self.weight.packed(), self.dtype, self.padding_idx, self.scale)
        set_module(root, name, settled.train(self.training))

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.dtype}"


class FakeTiedEmbedding(Twin):
    """Stands for an embedding that looks up the table of another.

    Args:
        embedding: whose table it reads.
        like: the float embedding.
        table: name of ``embedding`` in the model; empty where the model calls it its input embedding.
    """

    reads_another = True

    def __init__(self, embedding: FakeEmbedding, like: Any, table: str) -> None:
        super().__init__()
        self._embedding, self.table = (embedding,), table  # in a tuple, so that its tensors are no part of this one
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx, self.scale = like.padding_idx, row_scale(like)

    @property
    def weight(self) -> FakeWeight:
        """The table."""
        return self._embedding[0].weight

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] -> [..., width]."""
        return looked_up(self._embedding[0], ids, self.padding_idx, self.scale)

    def learned(self) -> list[tuple[str, Learned]]:
        """None of its own."""
        return []

    def float_values(self) -> dict[str, Tensor]:
        """The table, which the float model has under this name too."""
        return {"weight": self.weight.latent.detach()}

    def settle_in(self, root: nn.Module, name: str) -> None:  # noqa: D102
        settled = TiedEmbedding(quantized_table(root, name, self.table), self.scale, self.table)
        set_module(root, name, settled.train(self.training))
        untie(root)

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.num_embeddings}, {self.embedding_dim}, tied"


class FakeTiedHead(Twin):
    """Stands for an output head that multiplies with the table of an embedding: ``x @ table.T + b``.

    Args:
        embedding: whose table it reads.
        like: the float head; its bias is copied.
        table: name of ``embedding`` in the model; empty where the model calls it its input embedding.
    """

    dtype: torch.dtype
    reads_another = True

    def __init__(self, embedding: FakeEmbedding, like: Any, table: str) -> None:
        super().__init__()
        self._embedding, self.table = (embedding,), table  # in a tuple, so that its tensors are no part of this one
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.take_dtype(embedding.dtype)
        self.bias = None if like.bias is None else nn.Parameter(like.bias.detach().float().clone())

    @property
    def weight(self) -> FakeWeight:
        """The table."""
        return self._embedding[0].weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., tokens]."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.linear(x, self.weight(x.dtype).to(x.device), bias)

    def learned(self) -> list[tuple[str, Learned]]:
        """None of its own."""
        return []

    def float_values(self) -> dict[str, Tensor]:
        """The table, which the float model has under this name too, and the bias."""
        found = {"weight": self.weight.latent.detach()}
        return found if self.bias is None else {**found, "bias": self.bias.detach()}

    def settle_in(self, root: nn.Module, name: str) -> None:  # noqa: D102
        bias = None if self.bias is None else self.bias.detach().to(self.dtype, copy=True)
        set_module(root, name, TiedHead(quantized_table(root, name, self.table), bias, self.table).train(self.training))
        untie(root)

    def extra_repr(self) -> str:  # noqa: D102
        return f"in_features={self.in_features}, out_features={self.out_features}, tied"


def looked_up(embedding: FakeEmbedding, ids: Tensor, padding: int | None, scale: RowScale | None) -> Tensor:
    """Rows of the table of ``embedding``, scaled, in its dtype."""
    rows = embedding.weight.rows(ids.to(embedding.weight.latent.device), embedding.dtype, padding)
    return rows if scale is None else scale.times(rows)
