"""Normalisation layers that learn beside the quantized layers of a block: put in place, found, and settled.

They follow the quantized path alone: the float network keeps its own.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from nybble.calibration.block import BlockState
from nybble.models.adapter import under


class LearnedNorm(nn.Module):
    """Stands for a normalisation layer while its weight and bias learn in float32; its forward casts them.

    Args:
        like: the layer; left as it is.
    """

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self._like = (like,)  # in a tuple, so that it is no part of the state
        for name, parameter in like.named_parameters():
            self.register_parameter(name, nn.Parameter(parameter.detach().float().clone(), requires_grad=False))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the layer, with what was learned so far."""
        return functional_call(self._like[0], self._cast(), args, kwargs)

    def settle(self) -> nn.Module:
        """A layer of the kind and dtype that this one stands for."""
        made = copy.deepcopy(self._like[0])
        for name, value in self._cast().items():
            made.register_parameter(name, nn.Parameter(value.detach().clone(), requires_grad=False))
        return made

    def _cast(self) -> dict[str, Tensor]:
        like = dict(self._like[0].named_parameters())
        return {name: parameter.to(like[name].dtype) for name, parameter in self.named_parameters()}


def put_norms(state: BlockState) -> None:
    """Let every normalisation layer of a block, or of the part of it that a view is about, learn."""
    for name, module in list(state.module.named_modules()):
        if _is_norm(module) and _within(state, name):
            state.stand_in(name, LearnedNorm(module))


def settle_norms(state: BlockState) -> None:
    """Let layers with what was learned stand in the place of those that learn."""
    for name, norm in norms_of(state).items():
        state.stand_in(name, norm.settle())


def norms_of(state: BlockState) -> dict[str, LearnedNorm]:
    """Those of a block that learn, by name."""
    found = {name: module for name, module in state.beside.items() if isinstance(module, LearnedNorm)}
    return {name: module for name, module in found.items() if _within(state, name)}


def _within(state: BlockState, name: str) -> bool:
    return name == state.within or name.startswith(under(state.within))


def _is_norm(module: nn.Module) -> bool:
    """By its name, as families have classes of their own: ``LayerNorm``, ``LlamaRMSNorm``, ``BatchNorm2d``."""
    own = list(module.parameters())
    return (
        "Norm" in type(module).__name__
        and not isinstance(module, LearnedNorm)
        and not list(module.children())
        and bool(own)
        and all(parameter.dim() == 1 and parameter.is_floating_point() for parameter in own)
    )
