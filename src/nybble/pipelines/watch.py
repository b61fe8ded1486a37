"""What calibration shows of one block: which layers share an input, input ranges, second moments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from nybble.core.errors import DataError
from nybble.models.experts import expert_weights, routed_inputs
from nybble.models.trace import BlockCall, trace_groups
from nybble.pipelines.plan import Target
from nybble.pipelines.statistics import Range, SecondMoment
from nybble.qtensor import QuantParams
from nybble.quantizer import Quantizer
from nybble.solvers import Solver

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


def find_groups(
    block: nn.Module, targets: Sequence[Target], call: BlockCall, hidden: Tensor
) -> tuple[list[Group], list[str]]:
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


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What is known of a block's layers before they are solved.

    Attributes:
        groups: all linear targets. params: of static input quantizers, by the group's leader.
        moments: by leader; missing where nothing was seen. routed: by fused weight, one an expert.
    """

    groups: Sequence[Group]
    params: dict[str, QuantParams] = field(default_factory=dict)
    moments: dict[str, SecondMoment] = field(default_factory=dict)
    routed: dict[str, list[SecondMoment]] = field(default_factory=dict)


def see_nothing(targets: Sequence[Target]) -> Seen:
    """Without calibration: every linear target by itself."""
    return Seen(groups=[Group(members=(t,), inputs=t.rule.inputs) for t in targets if not t.experts])


def see_block(
    block: nn.Module, prefix: str, targets: Sequence[Target], solver: Solver, batches: Batches, tokens: int
) -> Seen:
    """Run a block on its calibration inputs, once for ranges and once for moments where those are needed.

    Args:
        block: with real float weights.
        prefix: its full name.
        targets: its weights, names relative to it.
        solver: says whether it wants second moments.
        batches: the block's inputs, batch by batch, as often as called.
        tokens: how many tokens those are.

    Raises:
        DataError: a layer with static inputs was never called, or saw NaN.
    """
    call, hidden = next(iter(batches()))
    groups, uncalled = find_groups(block, targets, call, hidden)
    alone = [g for g in see_nothing(targets).groups if g.leader in uncalled]
    for group in alone:
        if group.inputs is not None and group.inputs.static:
            name = f"{prefix}.{group.leader}"
            raise DataError(f"{name} was never called on the calibration data, so its activations have no scale.")
    params = _ranges(block, prefix, groups, batches, tokens)
    if not solver.needs_second_moment:
        return Seen(groups=[*groups, *alone], params=params)
    moments, routed = _moments(block, groups, targets, batches, params)
    return Seen(groups=[*groups, *alone], params=params, moments=moments, routed=routed)


def _ranges(
    block: nn.Module, prefix: str, groups: Sequence[Group], batches: Batches, tokens: int
) -> dict[str, QuantParams]:
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
    block: nn.Module,
    groups: Sequence[Group],
    targets: Sequence[Target],
    batches: Batches,
    params: Mapping[str, QuantParams],
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

        def see(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], watch: Callable[[Tensor], None] = watch
        ) -> None:
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
            module: nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            path: str = path,
            reads: dict[str, str] = reads,
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
