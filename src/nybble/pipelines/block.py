"""One block: see what its layers read, solve their weights, put the quantized layers in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.errors import DataError, within
from nybble.models.experts import expert_weights, routed_inputs
from nybble.models.trace import BlockCall, trace_groups
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.experts import PackedExperts
from nybble.nn.linear import QuantLinear
from nybble.nn.swap import matrix_of, set_module
from nybble.pipelines.plan import Target
from nybble.pipelines.report import LayerRow, layer_row
from nybble.pipelines.statistics import Range, SecondMoment
from nybble.qtensor import QTensor, QuantParams
from nybble.quantizer import Quantizer
from nybble.solvers import Solved, Solver, Weight

Batches = Callable[[], Iterable[tuple[BlockCall, Tensor]]]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Targets that read the same tensor under the same input quantizer; ``leader`` is the module to watch."""

    members: tuple[Target, ...]
    inputs: Quantizer | None

    @property
    def leader(self) -> str:
        """Name of the first module."""
        return self.members[0].name


def find_groups(block: nn.Module, targets: Sequence[Target], call: BlockCall, hidden: Tensor) -> tuple[list[Group], list[str]]:
    """Linear targets that share an input, and names of targets that the block never called.

    Two layers that read the same tensor through different input quantizers are two groups.
    """
    by_name = {t.name: t for t in targets if not t.experts}
    found: dict[tuple[str, ...], list[Target]] = {}
    trace = trace_groups(block, call, hidden)
    for names in trace.groups:
        for name in names:
            if name in by_name:
                found.setdefault((names[0], str(by_name[name].rule.inputs)), []).append(by_name[name])
    seen = {t.name for members in found.values() for t in members}
    groups = [Group(members=tuple(m), inputs=m[0].rule.inputs) for m in found.values()]
    return groups, [name for name in by_name if name not in seen]


def solve_block(
    block: nn.Module,
    prefix: str,
    targets: Sequence[Target],
    solver: Solver,
    batches: Batches | None,
    tokens: int,
    originals: Mapping[str, Tensor],
) -> list[LayerRow]:
    """Quantize the targets of one block in place.

    Args:
        block: with real weights, in the model's dtype. prefix: its full name. targets: names relative to it.
        batches: the calibration inputs of the block, batch by batch, as often as called; None without calibration.
        tokens: how many tokens those are.
        originals: parameters of the block in the source's own precision; solvers start from these.

    Returns:
        A row of the report for each weight.
    """
    alone = [Group(members=(t,), inputs=t.rule.inputs) for t in targets if not t.experts]
    groups, uncalled = alone, []
    params: dict[str, QuantParams] = {}
    moments: dict[str, SecondMoment] = {}
    routed: dict[str, list[SecondMoment]] = {}
    if batches is not None:
        first_call, first_hidden = next(iter(batches()))
        groups, uncalled = find_groups(block, targets, first_call, first_hidden)
        groups += [g for g in alone if g.leader in uncalled]
        seen = [g for g in groups if g.leader not in uncalled]
        params = _ranges(block, prefix, seen, batches, tokens)
        if solver.needs_second_moment:
            moments, routed = _moments(block, seen, targets, batches, params)
    rows: list[LayerRow] = []
    for group in groups:
        moment = moments.get(group.leader)
        second = None if moment is None else moment.mean(f"{prefix}.{group.leader}")
        if group.leader in uncalled and group.inputs is not None and group.inputs.static:
            raise DataError(f"{prefix}.{group.leader} was never called on the calibration data, so its activations have no scale.")
        rows += _solve_group(block, prefix, group, solver, second, params.get(group.leader), originals)
    for target in targets:
        if target.experts:
            rows += _solve_experts(block, prefix, target, solver, routed.get(target.name), originals)
    return rows


def _ranges(block: nn.Module, prefix: str, groups: Sequence[Group], batches: Batches, tokens: int) -> dict[str, QuantParams]:
    """Parameters of static input quantizers, by leader."""
    static = [g for g in groups if g.inputs is not None and g.inputs.static]
    if not static:
        return {}
    ranges = {g.leader: Range(tokens * g.members[0].shape[1]) for g in static}
    with _watching(block, {name: r.add for name, r in ranges.items()}):
        for call, hidden in batches():
            call.run(block, hidden)
    return {g.leader: ranges[g.leader].fit(g.inputs, f"{prefix}.{g.leader}") for g in static if g.inputs is not None}


def _moments(
    block: nn.Module, groups: Sequence[Group], targets: Sequence[Target], batches: Batches, params: Mapping[str, QuantParams]
) -> tuple[dict[str, SecondMoment], dict[str, list[SecondMoment]]]:
    """Second moments by leader, and for fused experts by target, one an expert."""
    weighted = [g for g in groups if any(t.rule.weights for t in g.members)]
    moments = {g.leader: SecondMoment(g.members[0].shape[1], g.inputs, params.get(g.leader)) for g in weighted}
    routed = {t.name: [SecondMoment(t.shape[1]) for _ in range(t.experts)] for t in targets if t.experts}
    with _watching(block, {name: m.add for name, m in moments.items()}), _watching_experts(block, routed):
        for call, hidden in batches():
            call.run(block, hidden)
    return moments, routed


@contextmanager
def _watching(block: nn.Module, watchers: Mapping[str, Callable[[Tensor], None]]) -> Iterator[None]:
    handles = []
    for name, watch in watchers.items():

        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], watch: Callable[[Tensor], None] = watch) -> None:
            watch(args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor)))

        handles.append(block.get_submodule(name).register_forward_pre_hook(see, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _watching_experts(block: nn.Module, routed: Mapping[str, list[SecondMoment]]) -> Iterator[None]:
    handles = []
    for path in sorted({name.rpartition(".")[0] for name in routed}):
        module = block.get_submodule(path)
        reads = {w.name: w.reads for w in expert_weights(module)}

        def see(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path, reads: dict[str, str] = reads
        ) -> None:
            hidden, index, weights = (*args, *kwargs.values())[:3]
            for found in routed_inputs(module, hidden.reshape(-1, hidden.shape[-1]), index, weights):
                for name, what in reads.items():
                    if f"{path}.{name}" in routed:
                        routed[f"{path}.{name}"][found.expert].add(found.hidden if what == "hidden" else found.inner)

        handles.append(module.register_forward_pre_hook(see, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _solve_group(
    block: nn.Module, prefix: str, group: Group, solver: Solver, second: Tensor | None, params: QuantParams | None,
    originals: Mapping[str, Tensor],
) -> list[LayerRow]:
    weights = []
    for target in group.members:
        if target.rule.weights is not None:
            matrix = _original(block, target.name, originals, f"{prefix}.{target.name}.weight")
            weights.append(Weight(name=f"{prefix}.{target.name}", matrix=matrix, quantizer=target.rule.weights))
    with within(f"{prefix}.{group.leader}"):
        solved = dict(zip([w.name for w in weights], solver.solve(weights, second) if weights else [], strict=True))
    rows = []
    matrices = {w.name: w.matrix for w in weights}
    for target in group.members:
        name = f"{prefix}.{target.name}"
        found = solved.get(name)
        old = block.get_submodule(target.name)
        kept = matrix_of(old)
        assert kept is not None
        inputs = None if target.rule.inputs is None else ActivationQuantizer(target.rule.inputs, params)
        outputs = None if target.rule.outputs is None else ActivationQuantizer(target.rule.outputs)
        weight: QTensor | Tensor = found.weight if found is not None else kept.detach()
        bias = old.bias.detach() if isinstance(old.bias, Tensor) else None
        set_module(block, target.name, QuantLinear(weight, bias, inputs, outputs))
        rows.append(layer_row(name, target.rule, matrices.get(name), found, params))
    return rows


def _solve_experts(
    block: nn.Module, prefix: str, target: Target, solver: Solver, moments: list[SecondMoment] | None, originals: Mapping[str, Tensor]
) -> list[LayerRow]:
    quantizer = target.rule.weights
    if quantizer is None:
        return []
    path, _, leaf = target.name.rpartition(".")
    module = block.get_submodule(path)
    transposed = next(w.transposed for w in expert_weights(module) if w.name == leaf)
    fused = originals.get(target.name)
    fused = module.get_parameter(leaf).detach() if fused is None else fused
    dtype = module.get_parameter(leaf).dtype
    solved: list[Solved] = []
    rows = []
    for expert in range(target.experts):
        name = f"{prefix}.{target.name}.{expert}"
        matrix = (fused[expert].T if transposed else fused[expert]).to(module.get_parameter(leaf).device).float().contiguous()
        _finite(matrix, name)
        second = None if moments is None else moments[expert].mean(name)
        with within(name):
            found = solver.solve([Weight(name=name, matrix=matrix, quantizer=quantizer)], second)[0]
        solved.append(found)
        rows.append(layer_row(name, target.rule, matrix, found, None))
    del module._parameters[leaf]
    module.add_module(leaf, PackedExperts([s.weight for s in solved], dtype, transposed=transposed))
    return rows


def _original(block: nn.Module, name: str, originals: Mapping[str, Tensor], what: str) -> Tensor:
    """The matrix [out, in] of a linear module as the source stores it, float32 on the block's device."""
    module = block.get_submodule(name)
    now = matrix_of(module)
    assert now is not None
    stored = originals.get(f"{name}.weight")
    matrix = now.detach() if stored is None else stored if isinstance(module, nn.Linear) else stored.T
    matrix = matrix.to(now.device).float().contiguous()
    _finite(matrix, what)
    return matrix



def _finite(matrix: Tensor, what: str) -> None:
    if not bool(torch.isfinite(matrix).all()):
        bad = int((~torch.isfinite(matrix)).sum())
        raise DataError(f"{what} holds {bad} NaN or Inf among {matrix.numel()} values; repair the model file, or add the layer to ignore.")
