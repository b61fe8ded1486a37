"""Folding the BatchNorms of a block into its convolutions before they are looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from nybble.calibration.watch import Batches
from nybble.nn.batchnorm import drop_norm, factors, find_folds
from nybble.nn.kinds import Target


def fold_norms(
    block: nn.Module, prefix: str, targets: Sequence[Target], originals: dict[str, Tensor], batches: Batches
) -> dict[str, str]:
    """Fold every BatchNorm that reads a convolution among ``targets``, in float32.

    Args:
        block: with real weights; changed in place.
        prefix: its full name.
        targets: names relative to it.
        originals: its parameters in the source's own precision; folded weights are added in float32.
        batches: its inputs.

    Returns:
        The convolutions, and the full names of the norms that are in them now.
    """
    convs = {target.name for target in targets if target.kind.channels_first}
    if not convs:
        return {}
    call, hidden = next(iter(batches()))
    pairs = {norm: conv for norm, conv in find_folds(block, partial(call.run, block, hidden)).items() if conv in convs}
    _fold(block, pairs, originals)
    return {conv: f"{prefix}.{norm}" for norm, conv in pairs.items()}


@torch.no_grad()
def fold_batchnorms(network: nn.Module, x: Tensor) -> dict[str, str]:
    """Fold every BatchNorm of a network that reads a convolution; pipelines do this by themselves.

    Args:
        network: in eval mode; changed in place.
        x: an input, to see what reads what.

    Returns:
        The BatchNorms that are gone, and the convolutions that they are in.
    """
    pairs = find_folds(network, partial(network, x))
    _fold(network, pairs, {})
    return pairs


def _fold(block: nn.Module, pairs: Mapping[str, str], originals: dict[str, Tensor]) -> None:
    for norm, conv in pairs.items():
        by, add = factors(block.get_submodule(norm), partial(_stored, block, originals, norm))
        weight, bias = _stored(block, originals, conv, "weight"), _stored(block, originals, conv, "bias")
        assert weight is not None
        originals[f"{conv}.weight"] = weight.float() * by.view(-1, *[1] * (weight.dim() - 1))
        originals[f"{conv}.bias"] = add if bias is None else add + by * bias.float()
        module = block.get_submodule(conv)
        dtype = next(module.parameters()).dtype
        for leaf in ("weight", "bias"):
            setattr(module, leaf, nn.Parameter(originals[f"{conv}.{leaf}"].to(dtype), requires_grad=False))
        drop_norm(block, norm)


def _stored(block: nn.Module, originals: dict[str, Tensor], name: str, leaf: str) -> Tensor | None:
    """A tensor of a module as the source stores it, on the block's device; None where the module has none."""
    live = getattr(block.get_submodule(name), leaf)
    if live is None:
        return None
    found = originals.get(f"{name}.{leaf}")
    tensor: Tensor = live.detach() if found is None else found.to(live.device)
    return tensor
