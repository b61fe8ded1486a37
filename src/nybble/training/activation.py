"""Another activation function in a network's feed-forward: ReLU, so that what follows it is never negative."""

from __future__ import annotations

from typing import Any

from torch import nn

from nybble.core.errors import ModelError, UsageError, did_you_mean

KEYS = ("hidden_act", "hidden_activation", "activation_function", "activation", "feed_forward_proj")
"""What configs of transformers call it; of T5 perhaps with ``gated-`` in front."""


def check_activation(name: str) -> None:
    """Whether transformers knows it.

    Raises:
        UsageError: it doesn't.
    """
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise UsageError(f"activation: there is no function {name!r}.{did_you_mean(name, ACT2FN)}")


def use_activation(model: Any, name: str) -> None:
    """Put another function where each module of the network's own stands, and into its config.

    Args:
        model: of transformers; changed in place.
        name: as configs have it, ``relu``.

    Raises:
        ModelError: its config names no function, or no module calculates it.
    """
    from transformers.activations import ACT2FN

    config: Any = getattr(model, "config", None)
    key = next((key for key in KEYS if isinstance(getattr(config, key, None), str)), None)
    if key is None:
        raise ModelError(f"{type(model).__name__} names no activation function in its config; leave activation out.")
    gated, _, old = getattr(config, key).rpartition("-")
    if old == name:
        return
    old = {"gelu": "gelu_new"}.get(old, old) if gated else old  # T5's "gated-gelu" is that
    places = [
        (parent, leaf)
        for parent in model.modules()
        for leaf, child in parent.named_children()
        if type(child) is type(ACT2FN[old])
    ]
    if not places:
        raise ModelError(f"{type(model).__name__} calculates {old} in no module of its own; leave activation out.")
    for parent, leaf in places:
        made: nn.Module = ACT2FN[name]
        setattr(parent, leaf, made)
    setattr(config, key, f"{gated}-{name}" if gated else name)
    if hasattr(config, "dense_act_fn"):
        config.dense_act_fn = name
