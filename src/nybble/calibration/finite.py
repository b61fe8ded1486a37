"""A loss that is no number: where the first value comes from that is none."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.errors import LearningError

_HUGE = 1e15
"""Of values beyond it a few million squares add up to more than float32 holds."""


def require_number(
    loss: float,
    step: int,
    what: str,
    layers: Mapping[str, nn.Module] | None = None,
    again: Callable[[], object] | None = None,
) -> None:
    """Refuse a loss that is NaN or Inf.

    Args:
        loss: of a step.
        step: its number.
        what: what trains, for the message.
        layers: by the names that people know them by.
        again: runs them once more on what the loss is of, without gradients; only where the loss is no number.

    Raises:
        LearningError: it is none; names the first layer that gives NaN or Inf, or the one that gives the largest
            values where these are too large for a sum of squares.
    """
    if math.isfinite(loss):
        return
    where = "" if again is None else _where(layers or {}, again)
    raise LearningError(f"{where}the loss of {what} is {loss} at step {step}; take smaller rates.")


@torch.no_grad()
def _where(layers: Mapping[str, nn.Module], again: Callable[[], object]) -> str:
    largest = dict[str, float]()

    def watch(name: str) -> Callable[..., None]:
        def see(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.numel() and math.isfinite(largest.get(name, 0.0)):
                largest[name] = float(output.abs().max())

        return see

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        again()
    finally:
        for handle in handles:
            handle.remove()
    bad = next((name for name, value in largest.items() if not math.isfinite(value)), None)
    if bad is not None:
        return f"{bad} gives NaN or Inf, so "
    name = max(largest, key=lambda name: largest[name], default="")
    return f"{name} gives values up to {largest[name]:.2g}, so " if largest.get(name, 0.0) > _HUGE else ""
