"""What each of a module's fused experts reads, worked out again from the routing: calibration must see every expert.

Transformers' modules of experts are called as ``experts(hidden, top_k_index, top_k_weights)`` and multiply inside,
where no hook sees it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from nybble.core.errors import ModelError

IN_NAMES = ("gate_up_proj", "up_proj")
DOWN = "down_proj"


@dataclass(frozen=True, kw_only=True)
class RoutedInput:
    """What one expert's matmuls read.

    ``module``: it is one of. ``expert``: its number. ``tokens``: rows of the hidden states that were sent to it, int64
    ``[n]``. ``hidden``: ``[n, hidden]``, read by gate_up_proj. ``gates``: the router's weight of each token, ``[n]``.
    """

    module: nn.Module
    expert: int
    tokens: Tensor
    hidden: Tensor
    gates: Tensor

    @cached_property
    @torch.no_grad()
    def inner(self) -> Tensor:
        """``[n, inner]``, read by down_proj; computed when it is asked for."""
        return _inner(self.module, self.expert, self.hidden)


def is_experts(module: nn.Module) -> bool:
    """Whether ``module`` holds fused expert weights: its own 3-D ``down_proj`` and ``gate_up_proj`` or ``up_proj``."""
    own = {name for name, parameter in module.named_parameters(recurse=False) if parameter.ndim == 3}
    return DOWN in own and any(name in own for name in IN_NAMES)


def takes_routing(module: nn.Module) -> bool:
    """Whether a module of experts is told which tokens go where, and so takes its matrices one expert at a time.

    Llama 4's and Inkling's shared ones multiply all of them at once with what was sorted before.
    """
    return len(inspect.signature(type(module).forward).parameters) >= 4  # self, hidden, top_k_index, top_k_weights


def is_transposed(module: nn.Module) -> bool:
    """Whether a module of experts keeps its matrices as [in, out]."""
    return bool(getattr(module, "is_transposed", False))


def _inner(module: nn.Module, expert: int, hidden: Tensor) -> Tensor:
    """The input of down_proj for tokens ``hidden`` ``[n, hidden]`` of one expert, as the module computes it."""
    name = next(n for n in IN_NAMES if isinstance(getattr(module, n, None), nn.Parameter))
    weight = module.get_parameter(name)[expert]
    product = hidden @ weight if is_transposed(module) else nn.functional.linear(hidden, weight)
    bias = getattr(module, f"{name}_bias", None)
    if isinstance(bias, Tensor):
        product = product + bias[expert]
    if name == "up_proj":
        activation = getattr(module, "act_fn", None)
        if not callable(activation):
            raise ModelError(f"{type(module).__name__} has no act_fn between its up_proj and down_proj.")
        return activation(product)  # type: ignore[no-any-return]
    gate = getattr(module, "_apply_gate", None)  # transformers gives each fused class one; some have their own
    if not callable(gate):
        raise ModelError(f"{type(module).__name__} doesn't say how gate and up combine (no _apply_gate).")
    return gate(product)  # type: ignore[no-any-return]


@torch.no_grad()
def routed_inputs(
    module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Iterator[RoutedInput]:
    """Yield what every expert that got a token reads, in the order of experts.

    Args:
        module: an experts module; the other arguments are those of its forward.
        hidden: ``[tokens, hidden]``.
        top_k_index: int64 ``[tokens, k]``; an index equal to the number of experts means "nowhere".
        top_k_weights: ``[tokens, k]``.
    """
    if top_k_index.shape != top_k_weights.shape:
        raise ModelError(
            f"top_k_index {list(top_k_index.shape)} and top_k_weights {list(top_k_weights.shape)} differ in shape; "
            "this router's calling convention is not known."
        )
    for expert in range(len(module.get_parameter(DOWN))):
        tokens, slot = torch.where(top_k_index == expert)
        if not len(tokens):
            continue
        gates = top_k_weights[tokens, slot]
        yield RoutedInput(module=module, expert=expert, tokens=tokens, hidden=hidden[tokens], gates=gates)
