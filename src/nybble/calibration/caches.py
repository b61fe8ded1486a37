"""What attentions cache, as the float block computes it: the largest magnitudes of keys and values."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nybble.calibration.window import Batches
from nybble.core.errors import DataError
from nybble.nn.kv_model import cache_argument

Largest = tuple[float, float]
"""Of keys and of values."""


class _Seen:
    """Stands where a cache would: notes what comes and gives it back. [batch, heads, tokens, width] each."""

    def __init__(self) -> None:
        self.largest: list[Tensor | None] = [None, None]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        for side, states in enumerate((key_states, value_states)):
            found = states.detach().abs().amax().float()
            before = self.largest[side]
            self.largest[side] = found if before is None else torch.maximum(before, found)
        return key_states, value_states


def see_caches(block: nn.Module, names: Iterable[str], prefix: str, batches: Batches) -> dict[str, Largest]:
    """Largest magnitudes of the keys and values of all samples, by attention.

    Args:
        block: with real float weights.
        names: of its attentions.
        prefix: of the block, for errors.
        batches: the block's inputs.

    Raises:
        DataError: one was never called so that it would cache, or keys or values hold NaN.
    """
    seen = {name: _Seen() for name in names}
    undo = [_given(block.get_submodule(name), cache) for name, cache in seen.items()]
    try:
        for call, given in batches():
            call.run(block, given)
    finally:
        for handle in undo:
            handle.remove()
    found = {}
    for name, cache in seen.items():
        keys, values = cache.largest
        if keys is None or values is None:
            raise DataError(f"{prefix}{name} cached nothing on the calibration data, so its KV cache has no scale.")
        found[name] = keys.item(), values.item()
        if not all(0 <= each < float("inf") for each in found[name]):
            raise DataError(f"keys or values of {prefix}{name} hold NaN or Inf; check the data and the model's dtype.")
    return found


def _given(attention: nn.Module, cache: _Seen) -> Any:
    """Let every call of an attention have that cache."""
    name = cache_argument(type(attention))
    return attention.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, name: cache}), with_kwargs=True
    )
