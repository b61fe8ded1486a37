"""Normalisation layers that learn beside the quantized layers of a block: put in place, found, and settled.

They follow the quantized path alone: the float network keeps its own.
"""

from __future__ import annotations

from nybble.calibration.block import BlockState
from nybble.models.adapter import under
from nybble.nn.learned_norm import LearnedNorm, is_norm


def put_norms(state: BlockState) -> None:
    """Let every normalisation layer of a block, or of the part of it that a view is about, learn."""
    for name, module in list(state.module.named_modules()):
        if is_norm(module) and _within(state, name):
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
