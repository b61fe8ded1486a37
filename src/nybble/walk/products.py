"""Products of two activations: see an attention's operands, choose their parameters, put the quantizers in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nybble.calibration.watch import Batches
from nybble.core.errors import DataError
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.attention import OPERANDS, PART, MatmulQuantizers, OperandWatch
from nybble.report.record import LayerRow
from nybble.solvers import Operand, Solver
from nybble.walk.plan import Product

SEQUENCES = 16
"""Sequences whose operands are looked at."""


def solve_products(
    block: nn.Module, prefix: str, products: Sequence[Product], solver: Solver, batches: Batches | None
) -> tuple[list[LayerRow], dict[str, MatmulQuantizers]]:
    """Find the operand quantizers of a block's attentions.

    Args:
        block: with real float weights.
        prefix: its full name and a dot.
        products: its attentions, names relative to it.
        solver: finds the parameters of static quantizers, from what the float block computes.
        batches: the block's inputs; None where nothing is calibrated (dynamic quantizers).

    Returns:
        A row for each operand, and for each attention what :func:`put_products` puts there.

    Raises:
        DataError: an attention was never called, or its operands hold NaN.
    """
    seen = _operands(block, [p for p in products if p.quantizer.static], batches)
    rows, found = [], {}
    for product in products:
        name = f"{prefix}{product.name}.{PART}"
        chosen: dict[str, tuple[Any, Any]] = dict.fromkeys(OPERANDS, (product.quantizer, None))
        if product.quantizer.static:
            chosen = dict(_solve(name, seen[product.name], product, solver))
        parts = {operand: ActivationQuantizer(*chosen[operand]) for operand in OPERANDS}
        found[product.name] = MatmulQuantizers(parts)
        rows += [_row(f"{name}.{operand}", *chosen[operand]) for operand in OPERANDS]
    return rows, found


def put_products(block: nn.Module, found: Mapping[str, MatmulQuantizers]) -> None:
    """Let the attentions of a block round their operands."""
    for name, parts in found.items():
        block.get_submodule(name).add_module(PART, parts)


def _operands(
    block: nn.Module, products: Sequence[Product], batches: Batches | None
) -> dict[str, dict[str, list[Tensor]]]:
    """The operands of the first sequences, by attention and operand: [sequences, heads, tokens, width]."""
    seen: dict[str, dict[str, list[Tensor]]] = {p.name: {operand: [] for operand in OPERANDS} for p in products}
    if not products or batches is None:
        return seen
    for product in products:
        kept = seen[product.name]

        def see(operand: str, x: Tensor, kept: dict[str, list[Tensor]] = kept) -> None:
            kept[operand].append(x.float())

        block.get_submodule(product.name).add_module(PART, OperandWatch(see))
    done = 0
    for call, hidden in batches():
        call.run(block, hidden)
        done += hidden.shape[0]
        if done >= SEQUENCES:
            break
    for product in products:
        delattr(block.get_submodule(product.name), PART)
    return seen


def _solve(name: str, seen: dict[str, list[Tensor]], product: Product, solver: Solver) -> list[tuple[str, Operand]]:
    if not seen["query"]:
        raise DataError(f"{name} was never called on the calibration data, so its operands have no scale.")
    found = {operand: torch.cat([x[:SEQUENCES] for x in parts])[:SEQUENCES] for operand, parts in seen.items()}
    for operand, x in found.items():
        if not bool(torch.isfinite(x).all()):
            raise DataError(f"the {operand} of {name} holds NaN or Inf; check the data and the model's dtype.")
    groups = found["query"].shape[1] // found["key"].shape[1]
    flat = {
        operand: (x.repeat_interleave(groups, 1) if operand in ("key", "value") else x).flatten(0, 1)
        for operand, x in found.items()
    }
    query, key = solver.solve_product(flat["query"], flat["key"], product.quantizer)
    probabilities, value = solver.solve_product(flat["probabilities"], flat["value"].mT.contiguous(), product.quantizer)
    return [("query", query), ("key", key), ("probabilities", probabilities), ("value", value)]


def _row(name: str, quantizer: Any, params: Any) -> LayerRow:
    """A row without a weight."""
    scale = None if params is None or not isinstance(params.scale, Tensor) else float(params.scale.max())
    return LayerRow(
        name=name, shape=(0,), weights=None, inputs=str(quantizer), outputs=None, bits=0.0, sqnr=None, error=None,
        rtn_error=None, input_scale=scale,
    )  # fmt: skip
