"""What masks keep for a share: one threshold for all layers of a kind, in exact arithmetic; token sets are nested."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from nybble.core.errors import DataError, ModelError, UsageError

Kept = dict[str, list[Tensor]]
"""By kind and layer, bool: attention [heads, features], mlp [units], tokens [patches]."""
STEPS = 10_000
"""Shares that are tried, each a part of them."""


def kept_at(scores: Sequence[Tensor], share: Fraction, least: int = 0) -> list[Tensor]:
    """What lies at or above the threshold of all layers together.

    Args:
        scores: by layer, of any shape; with their sign.
        share: of all elements, above 0 and up to 1. ``count - floor((1 - share) count)`` are kept, more where several
            are equal to the threshold.
        least: the best so many of each layer stay whatever the threshold is.

    Returns:
        Bool, of the same shapes.

    Raises:
        UsageError: a share outside. DataError: a score that is no number.

    >>> [kept.tolist() for kept in kept_at([torch.tensor([0.5, 0.1]), torch.tensor([0.2, -3.0])], Fraction(1, 2))]
    [[True, False], [True, False]]
    """
    if not 0 < share <= 1:
        raise UsageError(f"a share of units to keep is above 0 and up to 1; got {float(share):g}.")
    every = torch.cat([each.flatten() for each in scores])
    if bool(every.isnan().any()):
        raise DataError("a mask holds NaN; search with a smaller learning rate.")
    dropped = (1 - share) * len(every) // 1
    threshold = every.sort().values[int(dropped)]
    found = [each >= threshold for each in scores]
    for each, kept in zip(scores, found, strict=True):
        kept.view(-1)[each.flatten().argsort(descending=True, stable=True)[:least]] = True
    return found


def nested(kept: Sequence[Tensor]) -> list[Tensor]:
    """Token sets: what a later layer keeps, all before it keep too."""
    found = [kept[-1]]
    for each in reversed(kept[:-1]):
        found.append(each | found[-1])
    return found[::-1]


def choose(
    scores: Mapping[str, Sequence[Tensor]],
    full: Kept,
    share: Fraction,
    *,
    tokens: Fraction | None = None,
    least: int = 1,
) -> Kept:
    """What stays of each kind.

    Args:
        scores: by kind and layer, of what was searched; spread over what they stand for (a head, all heads).
        full: all true: shapes, and what a kind that wasn't searched keeps.
        share: of each kind's.
        tokens: of the patches; None: the same.
        least: as of :func:`kept_at`, of attention and MLP.

    Raises:
        ModelError: a layer would be left without any; names it.
    """
    found = dict(full)
    for kind, each in scores.items():
        part = tokens if kind == "tokens" and tokens is not None else share
        kept = kept_at(each, part, 0 if kind == "tokens" else least)
        kept = [one.expand(like.shape) for one, like in zip(kept, full[kind], strict=True)]
        found[kind] = nested(kept) if kind == "tokens" else kept
    check_kept(found)
    return found


def cheapest(
    full: Kept, kinds: Sequence[str], heads: str = "feature", least: int = 1, tokens: Fraction | None = None
) -> Kept:
    """What costs least of all that :func:`choose` may keep, whatever the scores are.

    Args:
        full: as of :func:`choose`.
        kinds: that have scores.
        heads: what a score of attention is of: a ``feature`` of a head, a ``head``, a feature of all heads of a
            ``layer``.
        least: as of :func:`choose`; of 0, too, no layer stays empty.
        tokens: as of :func:`choose`.
    """
    found, least = dict(full), max(1, least)
    if "attention" in kinds:
        found["attention"] = [_fewest(each, heads, least) for each in full["attention"]]
    if "mlp" in kinds:
        found["mlp"] = [_first(each, least) for each in full["mlp"]]
    if "tokens" in kinds:
        layers, count = len(full["tokens"]), sum(each.numel() for each in full["tokens"])
        stay = count - int((1 - (tokens or Fraction(1, STEPS))) * count // 1)  # an even spread multiplies least
        found["tokens"] = [_first(each, (stay + layers - 1 - i) // layers) for i, each in enumerate(full["tokens"])]
    return found


def _first(like: Tensor, count: int) -> Tensor:
    return (torch.arange(like.numel()) < count).view(like.shape)


def _fewest(like: Tensor, heads: str, least: int) -> Tensor:
    """Attention [heads, features] of one layer; as many heads as multiply least for so many features."""
    number, size = like.shape
    if heads == "head":
        return _first(like, least * size)
    if heads == "layer":
        return _first(like.T, least * number).T
    least = min(least, like.numel())
    spread = min(range(math.ceil(least / size), number + 1), key=lambda k: k * math.ceil(least / k))
    found = torch.zeros_like(like)
    for i in range(least):
        found[i % spread, i // spread] = True
    return found


def check_kept(kept: Kept) -> None:
    """Refuse a layer without any feature or unit.

    Raises:
        ModelError: names the first.
    """
    for kind in ("attention", "mlp"):
        for number, each in enumerate(kept[kind]):
            if not bool(each.any()):
                raise ModelError(
                    f"nothing is left of the {kind} of layer {number}; keep a larger share, or the best of each layer "
                    "(least=1)."
                )


def largest(fits: Callable[[Fraction], bool], most: Fraction = Fraction(1)) -> Fraction | None:
    """The largest share up to ``most`` that fits; None where none does.

    Args:
        fits: of a share; what fits, fits for every smaller one.
        most: begins the search.
    """
    if fits(most):
        return most
    low, high = 0, int(most * STEPS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(Fraction(middle, STEPS)) else (low, middle)
    return Fraction(low, STEPS) if low else None
