"""What a slim ViT has: parameters, and floating-point operations of an image."""

from __future__ import annotations

from typing import Any

from nybble.search.slimming.choose import Kept


def parameters(config: Any, kept: Kept) -> int:
    """All of them, biases, norms, embeddings and classifier too."""
    c, patch = config.hidden_size, config.patch_size**2 * config.num_channels
    patches = (config.image_size // config.patch_size) ** 2
    total: int = c * (patch + 1) + c + (patches + 1) * c + 2 * c + (c + 1) * config.num_labels
    for attention, units in zip(kept["attention"], kept["mlp"], strict=True):
        features, hidden = int(attention.sum()), int(units.sum())
        total += features * (3 * (c + int(config.qkv_bias)) + c) + c  # q, k, v; projection
        total += hidden * (c + 1 + c) + c + 4 * c
    return total


def flops(config: Any, kept: Kept) -> int:
    """Of products, two a multiply-accumulate; heads of a layer multiply as wide as its widest, and empty ones not."""
    c, patch = config.hidden_size, config.patch_size**2 * config.num_channels
    total: int = (config.image_size // config.patch_size) ** 2 * patch * c + c * config.num_labels
    for attention, units, patches in zip(kept["attention"], kept["mlp"], kept["tokens"], strict=True):
        sizes = [size for size in attention.sum(1).tolist() if size]
        tokens = 1 + int(patches.sum())
        total += tokens * c * 4 * sum(sizes) + 2 * tokens**2 * len(sizes) * max(sizes, default=0)
        total += tokens * 2 * c * int(units.sum())
    return 2 * total


def units(config: Any, kept: Kept) -> int:
    """Features of heads and units of MLPs, of all layers."""
    return sum(int(each.sum()) for kind in ("attention", "mlp") for each in kept[kind])


COSTS = {"parameters": parameters, "flops": flops, "units": units}
UNITS = {"parameters": "parameters", "flops": "FLOPs of an image", "units": "features of heads and units of MLPs"}
