"""One block: solve its weights, put the quantized layers in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nybble.calibration.statistics import SecondMoment
from nybble.calibration.watch import Group, Seen
from nybble.core.errors import DataError, within
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.kinds import Quantized, Target
from nybble.report.record import LayerRow, layer_row
from nybble.solvers import Solver, Stats, Weight


def solve_block(
    block: nn.Module,
    prefix: str,
    targets: Sequence[Target],
    solver: Solver,
    seen: Seen,
    originals: Mapping[str, Tensor],
) -> list[LayerRow]:
    """Quantize the targets of one block in place.

    Args:
        block: with real weights, in the model's dtype.
        prefix: its full name and a dot; empty for the model itself.
        targets: names relative to it.
        solver: the method.
        seen: what calibration showed; its moments are used up.
        originals: parameters of the block in the source's own precision; solvers start from these.

    Returns:
        A row of the report for each weight.
    """
    rows: list[LayerRow] = []
    for group in seen.groups:
        rows += _solve_group(block, prefix, group, solver, seen, originals)
    for target in targets:
        if target.kind.fused:
            rows += _solve_fused(block, prefix, target, solver, seen.routed.pop(target.name, None), originals)
    return rows


def _solve_group(
    block: nn.Module,
    prefix: str,
    group: Group,
    solver: Solver,
    seen: Seen,
    originals: Mapping[str, Tensor],
) -> list[LayerRow]:
    weights = []
    for target in group.members:
        if target.rule.weights is not None:
            matrix = _checked(_matrix(block, target, originals), f"{prefix}{target.name}.weight")
            weights.append(Weight(name=f"{prefix}{target.name}", matrix=matrix, quantizer=target.rule.weights))
    look = seen.looks.pop(group.leader, None)
    sample = None if look is None else look.all()
    stats, params = seen.stats(group, prefix), seen.params.get(group.leader)
    with within(f"{prefix}{group.leader}"):
        solved = dict(zip([w.name for w in weights], solver.solve(weights, stats) if weights else [], strict=True))
    rows = []
    shown = None if sample is None else sample.flatten(0, -2)
    given = {w.name: w for w in weights}
    for target in group.members:
        name = f"{prefix}{target.name}"
        found = solved.get(name)
        chosen = (target.rule.inputs, params) if found is None or found.inputs is None else found.inputs
        made = Quantized(
            weights=() if found is None else (found.weight,),
            inputs=None if chosen[0] is None else ActivationQuantizer(chosen[0], chosen[1]),
            outputs=None if target.rule.outputs is None else ActivationQuantizer(target.rule.outputs),
            folded=seen.folded.get(target.name, ""),
        )
        target.kind.put(block, target, made)
        rows.append(layer_row(name, target.rule, target.shape, given.get(name), found, chosen, shown))
    return rows


def _solve_fused(
    block: nn.Module,
    prefix: str,
    target: Target,
    solver: Solver,
    moments: list[SecondMoment] | None,
    originals: Mapping[str, Tensor],
) -> list[LayerRow]:
    """The matrices of one fused parameter, each by itself: each reads inputs of its own."""
    if target.rule.weights is None:
        return []
    matrices = _matrix(block, target, originals)
    solved, rows = [], []
    for number in range(target.matrices):
        name = f"{prefix}{target.name}.{number}"
        matrix = _checked(matrices[number], name)
        weight = Weight(name=name, matrix=matrix, quantizer=target.rule.weights)
        second = None if moments is None else moments[number].mean(name)
        with within(name):
            found = solver.solve([weight], Stats(second_moment=second))[0]
        solved.append(found.weight)
        rows.append(layer_row(name, target.rule, target.shape, weight, found, (None, None)))
    target.kind.put(block, target, Quantized(weights=solved))
    return rows


def _matrix(block: nn.Module, target: Target, originals: Mapping[str, Tensor]) -> Tensor:
    """A target's matrix as the source stores it, on the block's device."""
    module = block.get_submodule(target.module)

    def get(leaf: str) -> Tensor:
        now: Tensor = getattr(module, leaf).detach()
        return originals.get(f"{target.module}.{leaf}", now).to(now.device)

    return target.kind.matrix(module, target.leaf, get)


def _checked(matrix: Tensor, what: str) -> Tensor:
    """``matrix`` as float32, contiguous; raises DataError where it isn't finite."""
    check_finite(matrix, what)
    return matrix.float().contiguous()


def check_finite(tensor: Tensor, what: str) -> None:
    """Raise DataError, naming ``what``, where a weight has NaN or infinities."""
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise DataError(f"{what} holds {bad} NaN or Inf among {tensor.numel()} values; repair the model file.")
