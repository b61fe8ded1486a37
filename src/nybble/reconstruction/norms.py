"""Normalisation layers that learn beside the quantized layers of a block: put in place, found, and settled.

They follow the quantized path alone: the float network keeps its own.
"""

from __future__ import annotations

from nybble.calibration.block import BlockState
from nybble.nn.learned_norm import LearnedNorm, is_norm


def put_norms(state: BlockState) -> None:
    """Let every normalisation layer of a block learn."""
    for name, module in list(state.module.named_modules()):
        if is_norm(module):
            state.stand_in(name, LearnedNorm(module))


def settle_norms(state: BlockState) -> None:
    """Let layers with what was learned stand in the place of those that learn."""
    for name, norm in norms_of(state).items():
        state.stand_in(name, norm.settle())


def norms_of(state: BlockState) -> dict[str, LearnedNorm]:
    """Those of a block that learn, by name."""
    return {name: module for name, module in state.beside.items() if isinstance(module, LearnedNorm)}
