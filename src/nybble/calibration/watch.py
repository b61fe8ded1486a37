"""What calibration shows of one block: which layers share an input, input ranges, second moments."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nybble.calibration.statistics import InputSample, Range, SecondMoment
from nybble.calibration.trace import BlockCall, Tensors, trace_groups
from nybble.calibration.window import Batches, Known
from nybble.core.errors import DataError
from nybble.models.experts import expert_weights, routed_inputs
from nybble.nn.conv import CONVS, Geometry, is_conv
from nybble.nn.kinds import Target
from nybble.qtensor import QuantParams
from nybble.quantizer import Quantizer

SAMPLE = 1024
"""Tokens of an input that are looked at for pictures."""
PATCHES = 512  # of an image, that a convolution's statistics are made of at most
Gatherer = InputSample | SecondMoment


class Asker(Protocol):
    """Who wants to see inputs: a solver, say; its members as :class:`nybble.solvers.Solver` describes them."""

    @property
    def chooses_inputs(self) -> bool:
        """Whether it finds the parameters of static input quantizers itself."""

    @property
    def most_tokens(self) -> int:
        """How many inputs it wants at most."""

    def needs(self, inputs: Quantizer | None) -> frozenset[str]:
        """Which of ``second_moment``, ``inputs`` it reads, for inputs under this quantizer."""


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
    block: nn.Module, targets: Sequence[Target], call: BlockCall, given: Tensors
) -> tuple[list[Group], list[str]]:
    """Targets that share an input, and names of targets that the block never called.

    Two layers that read the same tensor through different input quantizers, or kernels, are two groups.
    """
    by_name = {t.name: t for t in targets if not t.experts}
    found: dict[tuple[str, str, str], list[Target]] = {}
    trace = trace_groups(block, call, given, CONVS)
    for names in trace.groups:
        for name in names:
            if name in by_name:
                key = (names[0], str(by_name[name].rule.inputs), _reading(block.get_submodule(name)))
                found.setdefault(key, []).append(by_name[name])
    seen = {t.name for members in found.values() for t in members}
    groups = [Group(members=tuple(m), inputs=m[0].rule.inputs) for m in found.values()]
    return groups, [name for name in by_name if name not in seen]


def _reading(module: nn.Module) -> str:
    """How a convolution cuts its input into columns; a linear layer's input has them as they are."""
    return str(replace(Geometry.of(module), channels=(0, 0))) if is_conv(module) else ""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What is known of a block's layers before they are solved.

    Attributes:
        groups: all linear targets. params: of static input quantizers, by the group's leader.
        moments: by leader; missing where nothing was seen. routed: by fused weight, one an expert.
        samples: inputs themselves, by leader. looks: a few of them, for pictures.
    """

    groups: Sequence[Group]
    params: dict[str, QuantParams] = field(default_factory=dict)
    moments: dict[str, SecondMoment] = field(default_factory=dict)
    routed: dict[str, list[SecondMoment]] = field(default_factory=dict)
    samples: dict[str, InputSample] = field(default_factory=dict)
    looks: dict[str, InputSample] = field(default_factory=dict)


def see_nothing(targets: Sequence[Target]) -> Seen:
    """Without calibration: every linear target by itself."""
    return Seen(groups=[Group(members=(t,), inputs=t.rule.inputs) for t in targets if not t.experts])


def see_block(
    block: nn.Module,
    prefix: str,
    targets: Sequence[Target],
    asker: Asker,
    batches: Batches,
    tokens: int,
    samples: int,
    known: Known | None = None,
) -> Seen:
    """Run a block on its calibration inputs, once for ranges and once for moments where those are needed.

    Args:
        block: with real float weights.
        prefix: its full name and a dot; empty for the model itself.
        targets: its weights, names relative to it.
        asker: says what it wants to see.
        batches: the block's inputs, batch by batch, as often as called.
        tokens: how many tokens those are. samples: how many samples.
        known: what was gathered of this block before, for other recipes; what is missing is added.

    Raises:
        DataError: a layer with static inputs was never called, or saw NaN.
    """
    call, given = next(iter(batches()))
    groups, uncalled = find_groups(block, targets, call, given)
    alone = [g for g in see_nothing(targets).groups if g.leader in uncalled]
    for group in alone:
        if group.inputs is not None and group.inputs.static:
            name = f"{prefix}{group.leader}"
            raise DataError(f"{name} was never called on the calibration data, so its activations have no scale.")
    known = {} if known is None else known
    params = {} if asker.chooses_inputs else _ranges(block, prefix, groups, batches, tokens, known)
    seen = Seen(groups=[*groups, *alone], params=params)
    if any(group.members[0].conv for group in groups):
        tokens = PATCHES * samples
    fresh: list[tuple[str, Gatherer]] = []

    def gather(leader: str, kind: str, make: Callable[[], Any]) -> Any:
        if (leader, kind) not in known:
            known[leader, kind] = made = make()
            fresh.append((leader, made))
        return known[leader, kind]

    for group in groups:
        wanted = asker.needs(group.inputs) if any(t.rule.weights for t in group.members) else frozenset()
        leader, width, parts = group.leader, group.members[0].shape[1], group.members[0].groups
        if "second_moment" in wanted:
            fixed = params.get(leader)
            seen.moments[leader] = gather(
                leader, f"moment {group.inputs} {fixed is None}",
                partial(SecondMoment, width, group.inputs, fixed, parts),
            )  # fmt: skip
        if "inputs" in wanted:
            most = asker.most_tokens
            seen.samples[leader] = gather(leader, f"inputs {most}", partial(InputSample, width, tokens, most, parts))
    for target in targets:
        if target.experts and "second_moment" in asker.needs(None):
            seen.routed[target.name] = [SecondMoment(target.shape[1]) for _ in range(target.experts)]
    if seen.moments or seen.samples or seen.routed or any(group.members[0].conv for group in groups):
        for group in groups:
            width, parts = group.members[0].shape[1], group.members[0].groups
            seen.looks[group.leader] = gather(group.leader, "look", partial(InputSample, width, tokens, SAMPLE, parts))
        _watch(block, fresh, seen.routed, batches)
    return seen


def _ranges(
    block: nn.Module, prefix: str, groups: Sequence[Group], batches: Batches, tokens: int, known: Known
) -> dict[str, QuantParams]:
    """Parameters of static input quantizers, by leader."""
    static = [g for g in groups if g.inputs is not None and g.inputs.static]
    if not static:
        return {}
    fresh = {g.leader: Range(tokens * g.members[0].shape[1]) for g in static if (g.leader, "range") not in known}
    if fresh:
        _run(block, batches, [(name, r.add) for name, r in fresh.items()])
    known.update({(name, "range"): r for name, r in fresh.items()})
    ranges: dict[str, Any] = {g.leader: known[g.leader, "range"] for g in static}
    return {g.leader: ranges[g.leader].fit(g.inputs, f"{prefix}{g.leader}") for g in static if g.inputs is not None}


def channel_maxima(block: nn.Module, names: Sequence[str], batches: Batches) -> dict[str, Tensor]:
    """Largest magnitude in each input channel of some modules, float32 [channels]; those never called are missing."""
    found: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[Tensor], None]:
        def add(x: Tensor) -> None:
            largest = x.reshape(-1, x.shape[-1]).abs().amax(0).float()
            found[name] = torch.maximum(found[name], largest) if name in found else largest

        return add

    _run(block, batches, [(name, note(name)) for name in names])
    return found


def _watch(
    block: nn.Module,
    fresh: Sequence[tuple[str, Gatherer]],
    routed: Mapping[str, list[SecondMoment]],
    batches: Batches,
) -> None:
    """Run the block once and let everything that gathers inputs gather them."""
    if not fresh and not routed:
        return
    adds: dict[str, list[Callable[[Tensor], None]]] = {}
    for name, part in fresh:
        adds.setdefault(name, []).append(part.add)
    watchers = [(name, _gatherer(block.get_submodule(name), each)) for name, each in adds.items()]
    with _watching_experts(block, routed):
        _run(block, batches, watchers)


def patches_of(groups: int, columns: int) -> int:
    """Patches that are taken of an image; fewer where many groups or channels would fill the memory."""
    return max(1, min(PATCHES, (1 << 19) // (groups * columns)))


def _gatherer(module: nn.Module, adds: Sequence[Callable[[Tensor], None]]) -> Callable[[Tensor], None]:
    """Shows a module's inputs to several, a convolution's as the columns that its kernels see."""
    geometry = Geometry.of(module) if is_conv(module) else None

    def watch(x: Tensor) -> None:
        if geometry is not None:
            x = geometry.patches(x, patches_of(geometry.groups, math.prod(geometry.shape[1:])))
        for add in adds:
            add(x)

    return watch


def _run(block: nn.Module, batches: Batches, watchers: Sequence[tuple[str, Callable[[Tensor], None]]]) -> None:
    """Run the block on all batches and show each watcher its module's inputs, but for those of padding tokens."""
    mask: Tensor | None = None
    handles = []
    for name, watch in watchers:

        def see(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], watch: Callable[[Tensor], None] = watch
        ) -> None:
            x = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
            watch(x if mask is None or x.shape[:2] != mask.shape else x[mask])

        handles.append(block.get_submodule(name).register_forward_pre_hook(see, with_kwargs=True))
    try:
        for call, given in batches():
            mask = call.mask
            call.run(block, given)
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
