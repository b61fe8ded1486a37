"""What an attention multiplies: the operands of its products, as the float block computes them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nybble.calibration.trace import HIDDEN
from nybble.calibration.window import Batches
from nybble.core.errors import DataError
from nybble.nn.kinds import Target

SEQUENCES = 16
"""Sequences whose operands are looked at."""


def see_operands(block: nn.Module, target: Target, name: str, batches: Batches) -> dict[str, Tensor]:
    """The operands of the first sequences, by name: float32 [sequences, heads, tokens, width].

    Args:
        block: with real float weights.
        target: a module with operands.
        name: what to call it in errors.
        batches: the block's inputs.

    Raises:
        DataError: it was never called, or its operands hold NaN.
    """
    seen: dict[str, list[Tensor]] = {operand: [] for operand in target.kind.operands}
    undo = target.kind.watch_operands(block.get_submodule(target.name), lambda o, x: seen[o].append(x.float()))
    try:
        done = 0
        for call, given in batches():
            call.run(block, given)
            done += len(given[HIDDEN])
            if done >= SEQUENCES:
                break
    finally:
        undo()
    if not all(seen.values()):
        raise DataError(f"{name} was never called on the calibration data, so its operands have no scale.")
    values = {operand: torch.cat([x[:SEQUENCES] for x in parts])[:SEQUENCES] for operand, parts in seen.items()}
    for operand, x in values.items():
        if not bool(torch.isfinite(x).all()):
            raise DataError(f"the {operand} of {name} holds NaN or Inf; check the data and the model's dtype.")
    return values
