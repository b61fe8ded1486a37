"""Fused mixture-of-experts weights: one 3-D parameter for all experts, so no ``nn.Linear`` to hook.

Transformers 5 keeps ``gate_up_proj`` ``[experts, 2 * inner, hidden]`` and ``down_proj`` ``[experts, hidden, inner]`` in
one module called as ``experts(hidden, top_k_index, top_k_weights)``. What each expert's two products read is worked
out here again from the routing, so that calibration sees every expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nybble.core.errors import ModelError

IN_NAMES = ("gate_up_proj", "up_proj")


@dataclass(frozen=True, kw_only=True)
class ExpertWeight:
    """A fused weight of an experts module.

    ``name``: of the parameter. ``shape``: ``[experts, out, in]``, or ``[experts, in, out]`` if ``transposed``.
    ``reads``: ``hidden`` (the block's hidden states) or ``inner`` (the gated activation).
    """

    name: str
    shape: tuple[int, int, int]
    transposed: bool
    reads: str

    @property
    def experts(self) -> int:
        """Number of experts."""
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """Width of what each expert's product reads."""
        return self.shape[1] if self.transposed else self.shape[2]

    @property
    def out_features(self) -> int:
        """Width of what it writes."""
        return self.shape[2] if self.transposed else self.shape[1]


@dataclass(frozen=True, kw_only=True)
class RoutedInput:
    """What one expert's matmuls read.

    ``tokens``: rows of the hidden states that were sent to it, int64 ``[n]``. ``hidden``: ``[n, hidden]``, read by
    gate_up_proj. ``inner``: ``[n, inner]``, read by down_proj. ``gates``: the router's weight of each token, ``[n]``.
    """

    expert: int
    tokens: Tensor
    hidden: Tensor
    inner: Tensor
    gates: Tensor


def is_experts(module: nn.Module) -> bool:
    """Whether ``module`` holds fused expert weights: its own 3-D ``down_proj`` and ``gate_up_proj`` or ``up_proj``."""
    own = {name for name, parameter in module.named_parameters(recurse=False) if parameter.ndim == 3}
    return "down_proj" in own and any(name in own for name in IN_NAMES)


def find_experts(block: nn.Module) -> list[tuple[str, nn.Module]]:
    """All modules with fused expert weights inside ``block``, by name."""
    return [(name, module) for name, module in block.named_modules() if is_experts(module)]


def expert_weights(module: nn.Module) -> list[ExpertWeight]:
    """The fused weights of an experts module, the one that reads the hidden states first.

    Raises:
        ModelError: not an experts module, or with 3-D weights whose place in the computation isn't known.
    """
    if not is_experts(module):
        raise ModelError(f"{type(module).__name__} has no fused expert weights (3-D gate_up_proj and down_proj).")
    transposed = bool(getattr(module, "is_transposed", False))
    found: list[ExpertWeight] = []
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim != 3:
            continue
        if name not in (*IN_NAMES, "down_proj"):
            raise ModelError(f"{type(module).__name__} has a 3-D weight {name!r} that nybble doesn't know how to feed.")
        experts, first, second = parameter.shape
        reads = "inner" if name == "down_proj" else "hidden"
        found.append(ExpertWeight(name=name, shape=(experts, first, second), transposed=transposed, reads=reads))
    return sorted(found, key=lambda weight: weight.reads != "hidden")


def _inner(module: nn.Module, expert: int, hidden: Tensor) -> Tensor:
    """The input of down_proj for tokens ``hidden`` ``[n, hidden]`` of one expert, as the module computes it."""
    name = next(n for n in IN_NAMES if isinstance(getattr(module, n, None), nn.Parameter))
    weight = module.get_parameter(name)[expert]
    product = hidden @ weight if getattr(module, "is_transposed", False) else nn.functional.linear(hidden, weight)
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
    for expert in range(expert_weights(module)[0].experts):
        tokens, slot = torch.where(top_k_index == expert)
        if not len(tokens):
            continue
        own = hidden[tokens]
        inner = _inner(module, expert, own)
        yield RoutedInput(expert=expert, tokens=tokens, hidden=own, inner=inner, gates=top_k_weights[tokens, slot])


def idle_experts(module: nn.Module, top_k_index: Tensor) -> tuple[int, ...]:
    """Experts that no token of ``top_k_index`` was sent to, so that no statistics exist for them."""
    seen = set(top_k_index.flatten().tolist())
    return tuple(e for e in range(expert_weights(module)[0].experts) if e not in seen)
