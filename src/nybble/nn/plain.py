"""Whether a module computes what its class's well-known ancestor does, or something of its own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

_DECIDE = ("__call__", "forward", "_conv_forward", "weight", "bias")


def computes_as(module: nn.Module, bases: Sequence[type[nn.Module]]) -> bool:
    """Whether a module is one of ``bases``, or a child that computes the same (with another initialisation, say).

    Cosine heads, standardised kernels, routers that return tuples and parametrized weights are such children too, and
    a layer that multiplies by their weight would be another function.
    """
    cls = type(module)
    base = next((c for c in cls.__mro__ if c in bases), None)
    if base is None or "forward" in module.__dict__ or module._parameters.get("weight") is None:
        return False
    between = cls.__mro__[: cls.__mro__.index(base)]
    return not any(name in vars(c) for c in between for name in _DECIDE)


def known_as(module: nn.Module, names: frozenset[str]) -> bool:
    """Whether a module's own class is one of these, by full name: the packages that they are of need not be there."""
    return f"{type(module).__module__}.{type(module).__qualname__}" in names
