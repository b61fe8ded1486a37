"""The networks of the study: a transformer (decoder, encoder, or both) and a residual convolutional network.

Plain ones, in few kernels: pre-norm blocks with RMSNorm and GELU, learned positions, no biases. The matrices that Muon
takes lie in ``layers``; embeddings and heads lie outside.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention on itself or on another sequence."""

    def __init__(self, width: int, heads: int, other: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width if other else 3 * width, bias=False)
        self.other = nn.Linear(width, 2 * width, bias=False) if other else None
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None, causal: bool = False, seen: Tensor | None = None) -> Tensor:
        """``x`` [batch, n, width], ``seen`` [batch, m, width]; ``mask`` bool [batch, 1, 1, keys], True where seen."""
        if self.other is None:
            query, key, value = self.query(x).chunk(3, dim=-1)
        else:
            query, (key, value) = self.query(x), self.other(seen).chunk(2, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value))
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
        done: Tensor = self.out(found.transpose(1, 2).flatten(2))
        return done


class Block(nn.Module):
    """Attention, attention on an encoder's output if there is one, and two matrices with a GELU between them."""

    def __init__(self, width: int, heads: int, dropout: float, other: bool = False) -> None:
        super().__init__()
        self.dropout = dropout
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(3 if other else 2))
        self.attention = Attention(width, heads)
        self.cross = Attention(width, heads, other=True) if other else None
        self.wide, self.narrow = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(
        self, x: Tensor, mask: Tensor | None, causal: bool, seen: Tensor | None = None, seen_mask: Tensor | None = None
    ) -> Tensor:
        """``x`` [batch, n, width]."""
        x = x + self.drop(self.attention(self.norms[0](x), mask, causal))
        if self.cross is not None:
            x = x + self.drop(self.cross(self.norms[2](x), seen_mask, seen=seen))
        return x + self.drop(self.narrow(F.gelu(self.wide(self.norms[1](x)), approximate="tanh")))

    def drop(self, x: Tensor) -> Tensor:
        """Dropout in training."""
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class Stack(nn.Module):
    """Positions, blocks and a last norm, on embeddings that come from outside."""

    def __init__(
        self, width: int, heads: int, layers: int, context: int, dropout: float, *, causal: bool, other: bool = False
    ) -> None:
        super().__init__()
        self.causal = causal
        self.positions = nn.Parameter(0.02 * torch.randn(context, width))
        self.layers = nn.ModuleList(Block(width, heads, dropout, other) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        for name, matrix in self.named_modules():
            if isinstance(matrix, nn.Linear):
                ends = name.endswith((".out", ".narrow"))  # GPT-2's start: what is added up gets smaller with depth
                nn.init.normal_(matrix.weight, std=0.02 / (2 * layers) ** 0.5 if ends else 0.02)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, seen: Tensor | None = None, seen_mask: Tensor | None = None
    ) -> Tensor:
        """``x`` [batch, n, width] to the same shape; masks bool [batch, 1, 1, n]."""
        x = x.float() + self.positions[: x.shape[1]]  # the stream is float32, whatever the weights are
        for block in self.layers:
            x = block(x, mask, self.causal, seen, seen_mask)
        done: Tensor = self.norm(x)
        return done


def embedding(words: int, width: int) -> nn.Embedding:
    """A table with small entries."""
    made = nn.Embedding(words, width)
    nn.init.normal_(made.weight, std=0.02)
    return made


class LanguageModel(nn.Module):
    """Embeddings shared with the output; hidden states come out, so that only what is predicted needs logits."""

    def __init__(self, words: int, width: int, heads: int, layers: int, context: int, *, causal: bool) -> None:
        super().__init__()
        self.table = embedding(words, width)
        self.stack = Stack(width, heads, layers, context, 0.0, causal=causal)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [batch, n] to hidden states [batch, n, width]."""
        done: Tensor = self.stack(self.table(ids))
        return done

    def logits(self, hidden: Tensor) -> Tensor:
        """Of any hidden states."""
        return F.linear(hidden, self.table.weight)


class TextEncoder(nn.Module):
    """The mean of an encoder's outputs over the tokens of a text, and a linear head."""

    def __init__(self, words: int, width: int, heads: int, layers: int, context: int, out: int, dropout: float) -> None:
        super().__init__()
        self.table = embedding(words, width)
        self.stack = Stack(width, heads, layers, context, dropout, causal=False)
        self.head = nn.Linear(width, out)

    def forward(self, ids: Tensor, pad: int = 0) -> Tensor:
        """Ids [batch, n], filled up with ``pad``, to [batch, out]."""
        real = ids != pad
        hidden = self.stack(self.table(ids), real[:, None, None, :])
        weight = real.to(hidden.dtype)[..., None]
        done: Tensor = self.head((hidden * weight).sum(1) / weight.sum(1).clamp(min=1))
        return done


class Translator(nn.Module):
    """Encoder and decoder over one table, which is the output's matrix too."""

    def __init__(self, words: int, width: int, heads: int, layers: int, context: int, dropout: float) -> None:
        super().__init__()
        self.table = embedding(words, width)
        self.encoder = Stack(width, heads, layers, context, dropout, causal=False)
        self.decoder = Stack(width, heads, layers, context, dropout, causal=True, other=True)

    def forward(self, source: Tensor, target: Tensor, pad: int = 0) -> Tensor:
        """Source [batch, n] and target so far [batch, m] to logits [batch, m, words]."""
        mask = (source != pad)[:, None, None, :]
        seen = self.encoder(self.table(source), mask)
        return F.linear(self.decoder(self.table(target), None, seen, mask), self.table.weight)


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut (He et al. 2016, arXiv:1512.03385, figure 2)."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))
        changes = stride > 1 or before != width
        self.shortcut = nn.Conv2d(before, width, 1, stride, bias=False) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[batch, before, h, w] to [batch, width, h / stride, w / stride]."""
        y = self.norms[1](self.second(F.relu(self.norms[0](self.first(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """A stem, three stages of residual blocks of doubling width, means, a linear head."""

    def __init__(self, width: int, blocks: int, classes: int) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        made, before = [], width
        for stage in range(3):
            for i in range(blocks):
                made.append(Residual(before, width << stage, 2 if stage and not i else 1))
                before = width << stage
        self.layers, self.head = nn.Sequential(*made), nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 1, 28, 28] to logits [batch, classes]."""
        x = self.stem(x).contiguous(memory_format=torch.channels_last)  # the fast order on tensor cores
        done: Tensor = self.head(self.layers(F.relu(self.norm(x))).mean((2, 3)))
        return done
