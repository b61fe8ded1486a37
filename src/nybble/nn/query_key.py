"""Query-key reparameterisation (QKR): one weight for both sides of an attention's score, which then don't part.

For head h, with W_q and W_k [width, channels] of it, and x_i, x_j what two tokens enter the attention as:

    (W_q x_i + b_q) . (W_k x_j + b_k)  =  (W x_i + b) . x_j + what is the same for all j, which softmax takes off

    W = W_k^T W_q    [channels, channels]          b = W_k^T b_q    [channels]

So queries are made by one linear layer of heads * channels rows, keys are the tokens themselves, for all heads, and b_k
is not needed. What trains, and is rounded, is W: each row has a scale, and 4 tensors of a score are rounded, not 6.

OFQ, Liu et al. 2023, "Oscillation-free Quantization for Low-bit Vision Transformers", arXiv:2302.02210. Where we
differ: theirs makes keys of W^T x_j and drops both biases, which leaves b out of the score; here W stands before
queries, so that b is an ordinary bias. Theirs trains W_q and W_k through their product; here W itself trains, from that
product on, so an element that annealing freezes stays what it was.

Transformers' attention splits queries and keys into heads before it hands them over: with nothing in place of their two
layers that are tokens, cut into pieces, which :func:`composed` puts together again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nybble.core.errors import ModelError
from nybble.nn.linear import QuantLinear

PART = "query_key"
"""Name of the submodule of an attention."""


class QueryKey(nn.Module):
    """``x W^T + b``, in float.

    Args:
        weight: [heads * channels, channels]. bias: [heads * channels].
        query, key: names of the layers that it stands for, in its attention.
    """

    def __init__(self, weight: Tensor, bias: Tensor, query: str, key: str) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.query, self.key = query, key

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return functional.linear(x, self.weight, self.bias)


class QuantQueryKey(QuantLinear):
    """Stands for :class:`QueryKey`; arguments as :class:`QuantLinear`, and the names."""

    def __init__(self, *given: Any, query: str, key: str) -> None:
        super().__init__(*given)
        self.query, self.key = query, key


@torch.no_grad()
def use_query_key(attention: nn.Module, query: str, key: str) -> QueryKey:
    """Put one layer where an attention has two, which computes the same.

    Args:
        attention: of transformers, whose query and key read the same tokens, and are multiplied as they come.
        query: name of its layer for queries.
        key: of that for keys.

    Raises:
        ModelError: they are no linear layers of [channels, channels], or heads don't divide the channels.
    """
    asked, keys = (attention._modules.get(name) for name in (query, key))
    width = getattr(attention, "head_dim", None) or getattr(attention, "attention_head_size", 0)
    plain = all(type(each) is nn.Linear for each in (asked, keys))
    shapes = {tuple(each.weight.shape) for each in (asked, keys) if isinstance(each, nn.Linear)}
    channels = next(iter(shapes))[1] if shapes else 0
    if not plain or shapes != {(channels, channels)} or not width or channels % width:
        raise ModelError(
            f"query_key takes two linear layers of as many rows as columns, {query} and {key}, whose heads divide "
            f"them; {type(attention).__name__} has {sorted(shapes) or 'none'} and heads of {width}. Leave it out."
        )
    assert isinstance(asked, nn.Linear) and isinstance(keys, nn.Linear)
    weight, bias = _product(asked, keys, width)
    made = QueryKey(weight, bias, query, key)
    for name in (query, key):
        attention.add_module(name, nn.Identity())
    attention.add_module(PART, made)
    return made


def _product(asked: nn.Linear, keys: nn.Linear, width: int) -> tuple[Tensor, Tensor]:
    """W and b of all heads, summed in float64, in the dtype of the layers."""
    channels, like = asked.in_features, asked.weight
    key, query = (layer.weight.double().view(-1, width, channels) for layer in (keys, asked))
    own = asked._parameters.get("bias")
    offset = torch.zeros_like(like[:, 0]) if own is None else own
    bias = key.mT @ offset.double().view(-1, width, 1)
    return (key.mT @ query).reshape(-1, channels).to(like.dtype), bias.reshape(-1).to(like.dtype)


def composed(module: nn.Module, query: Tensor, key: Tensor, scaling: object) -> tuple[Tensor, Tensor]:
    """Queries and keys of an attention with :data:`PART`; of any other as they are.

    Args:
        module: the attention.
        query: [batch, heads, tokens, width]; the tokens themselves, where there is one.
        key: the same.
        scaling: of the scores.

    Returns:
        [batch, heads, tokens, channels] and [batch, 1, tokens, channels].

    Raises:
        ModelError: without a scaling the eager attention would take one of the channels.
    """
    part = getattr(module, PART, None)
    if part is None:
        return query, key
    if scaling is None:
        raise ModelError(f"{type(module).__name__} says no scaling of its scores, so query_key can't keep it.")
    batch, heads, tokens, width = query.shape
    x = query.transpose(1, 2).reshape(batch, tokens, heads * width)
    made: Tensor = part(x)
    return made.view(batch, tokens, heads, heads * width).transpose(1, 2), x[:, None]
