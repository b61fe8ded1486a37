"""Putting modules into a model, and dense copies of its packed weights."""

from __future__ import annotations

import torch
from torch import nn

from nybble.nn.embedding import QuantEmbedding, TiedEmbedding, TiedHead
from nybble.nn.linear import QuantLinear
from nybble.nn.packed import Packed

_HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_backward_pre_hooks", "_backward_hooks",
)  # fmt: skip


BY_KERNELS = (QuantLinear, QuantEmbedding, TiedEmbedding, TiedHead)
"""Layers for whose weights there may be kernels; they say how."""


def set_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module``, without hooks of its own, at ``name``, with the hooks on calls of the one that was there.

    Both have the same from then on, so whoever registered one can still remove it.
    """
    parent, _, leaf = name.rpartition(".")
    owner = root.get_submodule(parent)
    old = owner._modules.get(leaf)
    if old is not None:
        for hooks in _HOOKS:  # plain attributes, for which Module's own setattr looks through parameters and buffers
            object.__setattr__(module, hooks, getattr(old, hooks))
        module._is_full_backward_hook = old._is_full_backward_hook
    owner.add_module(leaf, module)


def hold_slow(root: nn.Module, dtype: torch.dtype) -> None:
    """Keep dequantized copies of the packed weights that no kernel multiplies with: every call would unpack them."""
    for layer in root.modules():
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Packed) and not (isinstance(layer, BY_KERNELS) and layer.how()[0]):
            weight.hold(dtype)


def hold_dense(root: nn.Module, dtype: torch.dtype | None) -> None:
    """Keep (or with None, drop) dequantized copies of all packed weights: speed for memory, the same numbers."""
    for module in root.modules():
        if isinstance(module, Packed):
            module.hold(dtype)
