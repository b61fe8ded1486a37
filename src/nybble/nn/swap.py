"""Putting modules into a model, and dense copies of its packed weights."""

from __future__ import annotations

import torch
from torch import nn

from nybble.nn.packed import Packed


def set_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` at ``name``."""
    parent, _, leaf = name.rpartition(".")
    root.get_submodule(parent).add_module(leaf, module)


def hold_dense(root: nn.Module, dtype: torch.dtype | None) -> None:
    """Keep (or with None, drop) dequantized copies of all packed weights: speed for memory, the same numbers."""
    for module in root.modules():
        if isinstance(module, Packed):
            module.hold(dtype)
