"""One block: solve its weights, put the quantized layers in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nybble.calibration.statistics import SecondMoment
from nybble.calibration.watch import Group, Seen
from nybble.core.errors import DataError, within
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.experts import PackedExperts
from nybble.nn.swap import as_matrix, matrix_of, put_embedding, quantized, set_module, tie_head
from nybble.qtensor import QTensor
from nybble.report.record import LayerRow, layer_row
from nybble.solvers import Solved, Solver, Stats, Weight
from nybble.walk.plan import Target


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
        if target.experts:
            rows += _solve_experts(block, prefix, target, solver, seen.routed.pop(target.name, None), originals)
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
            matrix = _original(block, target.name, originals, f"{prefix}{target.name}.weight")
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
        old = block.get_submodule(target.name)
        kept = matrix_of(old)
        assert kept is not None
        chosen = (target.rule.inputs, params) if found is None or found.inputs is None else found.inputs
        inputs = None if chosen[0] is None else ActivationQuantizer(chosen[0], chosen[1])
        outputs = None if target.rule.outputs is None else ActivationQuantizer(target.rule.outputs)
        weight: QTensor | Tensor = found.weight if found is not None else kept.detach()
        bias = old.bias.detach() if isinstance(old.bias, Tensor) else None
        folded = seen.folded.get(target.name, "")
        set_module(block, target.name, quantized(old, weight, bias, inputs, outputs, folded))
        rows.append(layer_row(name, target.rule, target.shape, given.get(name), found, chosen, shown))
    return rows


def _solve_experts(
    block: nn.Module,
    prefix: str,
    target: Target,
    solver: Solver,
    moments: list[SecondMoment] | None,
    originals: Mapping[str, Tensor],
) -> list[LayerRow]:
    quantizer = target.rule.weights
    if quantizer is None:
        return []
    path, _, leaf = target.name.rpartition(".")
    module = block.get_submodule(path)
    transposed = bool(getattr(module, "is_transposed", False))
    fused = originals.get(target.name)
    fused = module.get_parameter(leaf).detach() if fused is None else fused
    dtype = module.get_parameter(leaf).dtype
    solved: list[Solved] = []
    rows = []
    for expert in range(target.experts):
        name = f"{prefix}{target.name}.{expert}"
        stored = fused[expert].T if transposed else fused[expert]
        weight = Weight(name=name, matrix=_checked(stored, fused.device, name), quantizer=quantizer)
        second = None if moments is None else moments[expert].mean(name)
        with within(name):
            found = solver.solve([weight], Stats(second_moment=second))[0]
        solved.append(found)
        rows.append(layer_row(name, target.rule, target.shape, weight, found, (None, None)))
    del module._parameters[leaf]
    module.add_module(leaf, PackedExperts([s.weight for s in solved], dtype, transposed=transposed))
    return rows


def solve_embedding(
    model: nn.Module, target: Target, solver: Solver, stats: Stats, originals: Mapping[str, Tensor]
) -> LayerRow:
    """Quantize an embedding's table in place, and let a head that is tied to it read the quantized one."""
    old = model.get_submodule(target.name)
    assert isinstance(old, nn.Embedding) and target.rule.weights is not None
    stored = originals.get(f"{target.name}.weight", old.weight.detach())
    matrix = _checked(stored, old.weight.device, f"{target.name}.weight")
    weight = Weight(name=target.name, matrix=matrix, quantizer=target.rule.weights)
    with within(target.name):
        found = solver.solve([weight], stats)[0]
    put_embedding(model, target.name, found.weight, old.weight.dtype)
    if target.head:
        tie_head(model, target.head)
    return layer_row(target.name, target.rule, target.shape, weight, found, (None, None))


def _original(block: nn.Module, name: str, originals: Mapping[str, Tensor], what: str) -> Tensor:
    """The matrix [out, in] of a linear module as the source stores it, float32 on the block's device."""
    module = block.get_submodule(name)
    now = matrix_of(module)
    assert now is not None
    stored = originals.get(f"{name}.weight")
    matrix = now.detach() if stored is None else as_matrix(module, stored)
    assert matrix is not None
    return _checked(matrix, now.device, what)


def _checked(matrix: Tensor, device: torch.device, what: str) -> Tensor:
    """``matrix`` as float32, contiguous, on ``device``; raises DataError where it isn't finite."""
    check_finite(matrix, what)
    return matrix.to(device).float().contiguous()


def check_finite(tensor: Tensor, what: str) -> None:
    """Raise DataError, naming ``what``, where a weight has NaN or infinities."""
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise DataError(f"{what} holds {bad} NaN or Inf among {tensor.numel()} values; repair the model file.")
