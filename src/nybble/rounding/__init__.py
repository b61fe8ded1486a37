"""How a value between two neighbours of a grid is decided: the tie rules, and stochastic rounding.

Between two neighbours everything but the exact midpoint is settled, so a deterministic rounding is a *tie rule*, and
any format under any such rounding is a sorted list of thresholds: ``rank = how many thresholds are <= x``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nybble.core.registry import Registry

REGISTRY = Registry("nybble.rounding", "rounding", lambda part: isinstance(part, Rounding))


@dataclass(frozen=True)
class Rounding:
    """A rule that settles ties.

    Attributes:
        name: the key, as in a quantizer line.
        tie_up: ``(lower, upper, upper_is_even) -> bool``, elementwise on arrays or tensors: whether the exact midpoint
            of the neighbouring values ``lower < upper`` goes to ``upper``; ``upper_is_even`` says which code is the
            even one.
        native: the format's own published encoder thresholds are used instead (only formats that have them).
        float32_middle: the midpoint is rounded to float32 first, as encoders do that compare with ``(a + b) / 2``.
        zero_inside: an integer zero point is added, in float32, before rounding; so the tie is between codes, not
            values.
        stochastic: up with probability ``(x - lower) / (upper - lower)``; needs a generator.
    """

    name: str
    tie_up: Callable[[Any, Any, Any], Any] | None = None
    native: bool = False
    float32_middle: bool = False
    zero_inside: bool = False
    stochastic: bool = False


_FOUND: dict[str, Rounding] = {}
"""Asked for before: every rounding of a training step asks, and a compiler can follow a look-up, no import."""


def get_rounding(name: str) -> Rounding:
    """Rounding by name: ``nearest-even``, ``half-away``, ``toward-zero``, ``native``, ``stochastic`` ..."""
    found = _FOUND.get(name)
    if found is None:
        found = _FOUND[name] = REGISTRY.get(name)
    return found
