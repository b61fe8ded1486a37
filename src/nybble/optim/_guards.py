"""What guards a step: options in range, elements that aren't finite, torch's own refusals."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nybble.core.errors import UsageError

Updated = tuple[Tensor, dict[str, Tensor]]
"""A parameter and its states after a step; float32."""


def check_range(name: str, given: object, *, count: int = 1, below: float = math.inf, whole: bool = False) -> None:
    """Raise UsageError unless ``given`` is a number in [0, below), or ``count`` of them; ``whole`` ones if asked.

    Others are float32 in a step: what would be infinite there is refused.
    """
    values = tuple(given) if isinstance(given, tuple | list) else (given,)
    kind = numbers.Integral if whole else numbers.Real
    most = below if whole else torch.finfo(torch.float32).max
    if len(values) != count or not all(
        isinstance(x, kind) and 0 <= float(x) < below and float(x) <= most for x in values
    ):
        what = f"{count if count > 1 else 'a'} {'whole ' if whole else ''}number{'s' if count > 1 else ''}"
        huge = any(isinstance(x, kind) and most < float(x) < math.inf for x in values)
        bound = f" and < {below:g}" if below < math.inf else f" and <= {most:g}, float32's largest" if huge else ""
        raise UsageError(f"{name} is {what} >= 0{bound}; got {', '.join(map(repr, values))}.")


class NonFiniteWarning(UserWarning):
    """Gradients, or states made of them, were NaN or infinite; those elements were left out of a step."""


def finite_only(rule: Callable[..., Updated], report: Callable[[Tensor], None]) -> Callable[..., Updated]:
    """``rule``, with elements set aside whose gradient or new state is not finite; ``report`` gets their number.

    Where a state is a sum over elements, also those whose square would make such a sum overflow.
    """

    def guarded(p: Tensor, grad: Tensor, states: dict[str, Tensor], step: int, options: Any) -> Updated:
        ok = grad.isfinite()
        if any(x.shape != p.shape for x in states.values()):
            ok = ok & (grad * grad * max(grad.numel(), 1)).isfinite()
        moved, new = rule(p, torch.where(ok, grad, 0), states, step, options)
        for x in new.values():
            ok = ok & x.isfinite() if x.shape == p.shape else ok
        report(ok.numel() - ok.sum())
        new = {name: torch.where(ok, x, 0) if x.shape == p.shape else x for name, x in new.items()}
        return torch.where(ok, moved, p), new

    return guarded


@contextmanager
def torch_refusals() -> Iterator[None]:
    """What torch refuses (no parameters, a duplicate, a tensor that isn't a leaf) as a UsageError with its text."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UsageError(f"torch's optimizers refuse this: {error}.") from error
