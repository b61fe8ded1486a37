"""What a prepared model holds: float weights by their names before it was prepared, and what its parts learned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nybble.nn.twin import Twin


def float_values(model: nn.Module) -> dict[str, Tensor]:
    """Float32 weights of a prepared model under the names that the float model has for them, and its other tensors.

    A fresh float model that loads them (``load_state_dict``) and is prepared for other bits goes on from there.
    """
    twins = {name: module for name, module in model.named_modules() if isinstance(module, Twin)}
    inside = tuple(f"{name}." for name in twins)
    found = {key: t for key, t in model.state_dict().items() if not key.startswith(inside)}
    for name, twin in twins.items():
        found |= {f"{name}.{key}".removesuffix("."): t for key, t in twin.float_values().items()}
    return found


def learned_values(model: nn.Module) -> dict[str, nn.Parameter]:
    """What the parts of a prepared model learn beside its weights: scales, thresholds, by full name."""
    found: dict[str, nn.Parameter] = {}
    names = {id(p): name for name, p in model.named_parameters()}
    for module in model.modules():
        if isinstance(module, Twin):
            for group, parameters in module.groups().items():
                if "." in group:
                    found |= {names[id(p)]: p for p in parameters}
    return found


@torch.no_grad()
def inherit(model: nn.Module, before: nn.Module) -> list[str]:
    """Give a prepared model what another one has learned, where both learn it under the same name and shape.

    Returns:
        names of what was taken.
    """
    own, others = learned_values(model), learned_values(before)
    taken = [name for name, p in own.items() if name in others and others[name].shape == p.shape]
    for name in taken:
        own[name].copy_(others[name])
    return taken
