"""Attention of blocks: scores, probabilities and their sums of values in integers. Source: BCT (arXiv:2304.01483).

Each head of each token has a shift of its own, so cached codes never change. A key's shift becomes part of its score,
a value's part of its probability, before that is narrowed: what is multiplied are codes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.errors import ModelError
from nybble.nn.attention import HARMLESS
from nybble.nn.integer.block_products import product
from nybble.nn.integer.block_softmax import BITS, block_softmax
from nybble.nn.integer.blocks import FINEST, Blocks, joined, narrow
from nybble.nn.integer.shifts import shift_right

IMPLEMENTATION = "nybble-blocks"
STRIP = 64
"""Keys whose probabilities share a shift."""
_KNOWN = frozenset(("dropout",)) | HARMLESS


def attend(
    module: nn.Module,
    query: Blocks,
    key: Blocks,
    value: Blocks,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Blocks, None]:
    """As an attention of transformers' interface.

    Args:
        module: the attention.
        query: [batch, heads, tokens, width].
        key: [batch, key heads, keys, width].
        value: as ``key``.
        attention_mask: bool, what is seen, [batch, 1, tokens, keys]; None is all.
        scaling: of scores.
        **others: what changes nothing.

    Returns:
        [batch, tokens, heads, width], and no probabilities.

    Raises:
        ModelError: an argument that asks for something else.
    """
    if asked := [name for name, given in others.items() if given is not None and name not in _KNOWN]:
        raise ModelError(f"{type(module).__name__} hands {asked[0]} to its attention, which integers don't follow.")
    scores, shifts = product(query, _for_heads(key, query))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    shares = block_softmax(scores, shifts, scaling, attention_mask)
    value = _for_heads(value, query)
    strips = zip(torch.split(value.codes, value.strip, -1), value.shifts.unbind(-1), strict=True)
    found = [_of_strip(shares, codes, own, attention_mask) for codes, own in strips]
    return joined(found, -1).transpose(1, 2), None


def _for_heads(x: Blocks, query: Blocks) -> Blocks:
    """Key heads, repeated for the heads that share them."""
    times = query.shape[1] // x.shape[1]
    if times == 1:
        return x
    return Blocks(x.codes.repeat_interleave(times, 1), x.shifts.repeat_interleave(times, 1), x.strip)


def _of_strip(shares: Tensor, codes: Tensor, shifts: Tensor, seen: Tensor | None) -> Blocks:
    """Sums of some columns of values.

    Args:
        shares: probabilities times 2^16, [..., tokens, keys].
        codes: of values, [..., keys, columns].
        shifts: of them, [..., keys].
        seen: bool.
    """
    own = shifts[..., None, :].to(torch.int64).expand(shares.shape)
    own = own if seen is None else torch.where(seen, own, FINEST)
    least = own.amin(-1, keepdim=True)
    weights = narrow(shift_right(shares, own - least), torch.full_like(least, BITS), STRIP)
    turned = codes.transpose(-1, -2)
    none = torch.zeros((*turned.shape[:-1], weights.shifts.shape[-1]), dtype=torch.int8, device=codes.device)
    sums, found = product(weights, Blocks(turned, none, STRIP))
    return narrow(sums, found + least, codes.shape[-1])
