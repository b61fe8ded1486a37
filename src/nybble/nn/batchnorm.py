"""BatchNorm folded into the convolution before it: exact, and what deployed networks do before they are quantized.

A BatchNorm in eval mode multiplies channel c by ``g_c = weight / sqrt(running_var + eps)`` and adds
``bias - g_c running_mean``. Quantizing the convolution without folding would leave that product in float.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.errors import ModelError
from nybble.nn.conv import is_conv
from nybble.nn.swap import set_module

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def find_folds(block: nn.Module, run: Callable[[], object]) -> dict[str, str]:
    """BatchNorms that read exactly what a convolution gave: norm -> convolution.

    Args:
        block: where to look.
        run: calls the block once.
    """
    made: dict[int, tuple[str, Tensor]] = {}
    found: dict[str, str] = {}
    calls: dict[str, int] = {}
    handles = []

    def note_conv(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            made[id(output)] = (name, output)  # kept alive, so that no other tensor gets its id
            calls[name] = calls.get(name, 0) + 1

        return hook

    def note_norm(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            before = made.get(id(args[0]))
            if before is not None:
                found[name] = before[0]

        return hook

    for name, module in block.named_modules():
        if is_conv(module):
            handles.append(module.register_forward_hook(note_conv(name)))
        elif foldable(module):
            handles.append(module.register_forward_pre_hook(note_norm(name)))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    norms = list(found.values())
    return {norm: conv for norm, conv in found.items() if norms.count(conv) == 1 and calls[conv] == 1}


def foldable(module: nn.Module) -> bool:
    """A BatchNorm with statistics of its own: torch's, or timm's with an activation behind it."""
    if not isinstance(module, NORMS) or module.running_mean is None:
        return False
    return type(module) in NORMS or (hasattr(module, "act") and hasattr(module, "drop"))


def factors(norm: Any, values: Callable[[str], Tensor | None]) -> tuple[Tensor, Tensor]:
    """What a BatchNorm multiplies each channel by, and adds; float32 [channels].

    Args:
        norm: the module.
        values: its tensors by name, in the source's precision.
    """

    def get(name: str, default: float) -> Tensor:
        found = values(name)
        return torch.full_like(mean, default) if found is None else found.float()

    found_mean = values("running_mean")
    assert found_mean is not None
    mean = found_mean.float()
    by = get("weight", 1.0) / torch.sqrt(get("running_var", 1.0) + norm.eps)
    return by, get("bias", 0.0) - by * mean


def remainder(norm: Any) -> nn.Module:
    """What is left of a folded norm: nothing, or its activation."""
    return nn.Identity() if type(norm) in NORMS else nn.Sequential(norm.drop, norm.act)


def drop_norm(root: nn.Module, name: str) -> None:
    """Take out a BatchNorm that was folded; its activation stays.

    Raises:
        ModelError: there is none.
    """
    try:
        norm = root.get_submodule(name)
    except AttributeError as error:
        raise ModelError(f"the model has no BatchNorm called {name!r}.") from error
    if not foldable(norm):
        raise ModelError(f"{name} is a {type(norm).__name__}, which can't have been folded.")
    set_module(root, name, remainder(norm))
