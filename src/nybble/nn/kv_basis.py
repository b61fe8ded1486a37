"""The channels of cached heads in another basis: rotated, or in the order of their size.

Both leave attention as it is, in float: they are undone when keys and values are read. So neither the rotary embedding
in front of a cache nor the layout of its pairs matters to a file, which holds no order: it follows from the weights
that a model has.

* ``rotate``: a Hadamard matrix over the channels of a head, in blocks of the largest order that divides them
  (QuaRot, Ashkboos et al. 2024, arXiv:2404.00456, section 4).
* ``sort``: K-sort (Trukhanov and Soloveychik 2024, arXiv:2403.20137): by the norms of the rows of the projection, the
  largest first, in each head by itself. The two channels that a rotary embedding mixes have the norm of the pair, which
  it preserves, and stay neighbours. Theirs permutes W_q and W_k; behind a rotary embedding, whose frequencies belong to
  places, that would be another model, so the order is kept beside the cache.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.errors import ModelError
from nybble.core.orthogonal import largest_block, rotation
from nybble.nn.packed import Packed

Orders = Mapping[str, Tensor]
"""Of ``keys`` and ``values``: int64 [heads, width], which channel stands at each place."""
PROJECTIONS = {"keys": "k_proj", "values": "v_proj"}


@dataclass(frozen=True)
class Rotated:
    """``matrix``: float32 [width, width], orthogonal."""

    matrix: Tensor

    @staticmethod
    def of(width: int, device: torch.device) -> Rotated:
        """A Hadamard matrix over as many neighbours as one is known for."""
        return Rotated(rotation(width, "hadamard", largest_block(width), False, 0).to(device))

    def into(self, x: Tensor) -> Tensor:
        """[batch, heads, tokens, width] rotated, float32, before it is rounded."""
        return x.float() @ self.matrix

    def back(self, x: Tensor) -> Tensor:
        """Inverse of :meth:`into`."""
        return x.float() @ self.matrix.mT


@dataclass(frozen=True)
class Sorted:
    """``order``: int64 [heads, width]. ``places``: its inverse."""

    order: Tensor
    places: Tensor

    @staticmethod
    def of(order: Tensor, device: torch.device) -> Sorted:
        """By an order of each head."""
        return Sorted(order.to(device), order.argsort(1).to(device))

    def into(self, x: Tensor) -> Tensor:
        """[batch, heads, tokens, width] with the channels in order."""
        return x.gather(3, self.order[None, :, None].expand_as(x))

    def back(self, x: Tensor) -> Tensor:
        """Inverse of :meth:`into`."""
        return x.gather(3, self.places[None, :, None].expand_as(x))


Basis = Rotated | Sorted


def descending(norms: Tensor, partner: Tensor | None = None) -> Tensor:
    """The order of channels by their norms, the largest first; equal ones as they come.

    Args:
        norms: [heads, width].
        partner: int64 [width]: the channel that a rotary embedding mixes each with, itself where it mixes none.

    Returns:
        int64 [heads, width]; partners are neighbours, at the norm of the pair.
    """
    if partner is None:
        return norms.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(len(partner))
    pair = torch.where(partner == places, norms.square(), norms.square() + norms.square()[:, partner])
    together = torch.minimum(places, partner).argsort(dim=0, stable=True)
    return together[pair[:, together].argsort(dim=1, descending=True, stable=True)]


def check_sortable(attention: nn.Module, name: str, sides: Iterable[str]) -> None:
    """Raise ModelError where an attention has no projection by itself whose rows could be measured."""
    for side in sides:
        layer = getattr(attention, PROJECTIONS[side], None)
        width = getattr(attention, "head_dim", None)
        if not isinstance(width, int) or getattr(layer, "weight", None) is None:
            raise ModelError(
                f"sort={side}: {name or type(attention).__name__} has no {PROJECTIONS[side]} whose rows, a head's "
                "channels each, could be measured. Take rotate, which needs no weights; or leave sort out (without a "
                "rotary embedding the transform ksort sorts the weights themselves)."
            )


@torch.no_grad()
def order_of(attention: nn.Module, side: str) -> Tensor:
    """The order of the channels of ``keys`` or ``values``, by the weights as they are now; int64 [heads, width], CPU.

    Norms of heads behind the projection count with their weights.

    Raises:
        ModelError: as :func:`check_sortable`.
    """
    check_sortable(attention, "", (side,))
    found: Any = getattr(attention, PROJECTIONS[side]).weight
    weight: Tensor = found(torch.float32) if isinstance(found, Packed) else found
    norms = weight.detach().double().cpu().norm(dim=1).view(-1, int(attention.head_dim))  # type: ignore[arg-type]
    norm = getattr(attention, "k_norm", None) if side == "keys" else None
    if norm is not None and getattr(norm, "weight", None) is not None:
        size = norm.weight.numel()
        gain = norm(torch.ones(size, dtype=norm.weight.dtype, device=norm.weight.device)).double().cpu().abs()
        norms = norms * gain.view(-1, norms.shape[1]) if size % norms.shape[1] == 0 else norms
    return descending(norms, partners(attention) if side == "keys" else None)


def partners(attention: nn.Module) -> Tensor | None:
    """The channel that each channel of a head is mixed with, as its family's rotary embedding has them; None of none.

    Families have a function ``rotate_half``, of halves or of neighbours: which, it shows.
    """
    turn = getattr(sys.modules[type(attention).__module__], "rotate_half", None)
    if turn is None:
        return None
    width: int = attention.head_dim  # type: ignore[assignment]
    config: Any = getattr(attention, "config", None)
    found = getattr(config, "rope_parameters", None) or {}
    share = found.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    places = torch.arange(width)
    turned = int(width * share)
    places[:turned] = turn(torch.arange(1, turned + 1)).abs() - 1
    return places
