"""Products of two activations: see a module's operands, choose their parameters, put the quantizers in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from nybble.calibration.watch import Batches
from nybble.core.errors import DataError
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.kinds import Quantized, Target
from nybble.report.record import LayerRow
from nybble.solvers import Operand, Solver

SEQUENCES = 16
"""Sequences whose operands are looked at."""


def solve_products(
    block: nn.Module, prefix: str, products: Sequence[Target], solver: Solver, batches: Batches | None
) -> tuple[list[LayerRow], list[tuple[Target, Quantized]]]:
    """Find the operand quantizers of a block's attentions.

    Args:
        block: with real float weights.
        prefix: its full name and a dot.
        products: its targets with operands, names relative to it.
        solver: finds the parameters of static quantizers, from what the float block computes.
        batches: the block's inputs; None where nothing is calibrated (dynamic quantizers).

    Returns:
        A row for each operand, and for each target what :func:`put_products` puts there.

    Raises:
        DataError: an attention was never called, or its operands hold NaN.
    """
    static = [t for t in products if t.rule.matmuls is not None and t.rule.matmuls.static]
    seen = _operands(block, static, batches)
    rows, found = [], []
    for target in products:
        name = f"{prefix}{target.name}.{target.kind.part}"
        chosen: dict[str, tuple[Any, Any]] = dict.fromkeys(target.kind.operands, (target.rule.matmuls, None))
        if target.name in seen:
            chosen |= _solve(name, seen[target.name], target, solver)
        made = {operand: ActivationQuantizer(*chosen[operand]) for operand in chosen}
        found.append((target, Quantized(operands=made)))
        rows += [_row(f"{name}.{operand}", *chosen[operand]) for operand in chosen]
    return rows, found


def put_products(block: nn.Module, found: Sequence[tuple[Target, Quantized]]) -> None:
    """Let the attentions of a block round their operands."""
    for target, made in found:
        target.kind.put(block, target, made)


def _operands(
    block: nn.Module, products: Sequence[Target], batches: Batches | None
) -> dict[str, dict[str, list[Tensor]]]:
    """The operands of the first sequences, by target and operand: [sequences, ...] each."""
    seen: dict[str, dict[str, list[Tensor]]] = {t.name: {name: [] for name in t.kind.operands} for t in products}
    if not products or batches is None:
        return seen
    with ExitStack() as undo:
        for target in products:
            kept = seen[target.name]

            def see(operand: str, x: Tensor, kept: dict[str, list[Tensor]] = kept) -> None:
                kept[operand].append(x.float())

            undo.callback(target.kind.watch_operands(block.get_submodule(target.name), see))
        done = 0
        for call, hidden in batches():
            call.run(block, hidden)
            done += hidden.shape[0]
            if done >= SEQUENCES:
                break
    return seen


def _solve(name: str, seen: Mapping[str, list[Tensor]], target: Target, solver: Solver) -> dict[str, Operand]:
    if not all(seen.values()):
        raise DataError(f"{name} was never called on the calibration data, so its operands have no scale.")
    values = {operand: torch.cat([x[:SEQUENCES] for x in parts])[:SEQUENCES] for operand, parts in seen.items()}
    for operand, x in values.items():
        if not bool(torch.isfinite(x).all()):
            raise DataError(f"the {operand} of {name} holds NaN or Inf; check the data and the model's dtype.")
    quantizer, found = target.rule.matmuls, {}
    assert quantizer is not None
    for (left, x), (right, y) in target.kind.pairs(values):
        found[left], found[right] = solver.solve_product(x, y, quantizer)
    return found


def _row(name: str, quantizer: Any, params: Any) -> LayerRow:
    """A row without a weight."""
    scale = None if params is None or not isinstance(params.scale, Tensor) else float(params.scale.max())
    return LayerRow(
        name=name, shape=(0,), weights=None, inputs=str(quantizer), outputs=None, bits=0.0, sqnr=None, error=None,
        rtn_error=None, input_scale=scale,
    )  # fmt: skip
