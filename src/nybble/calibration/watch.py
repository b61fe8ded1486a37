"""What calibration shows of one block: which layers share an input, input ranges, second moments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from nybble.calibration.block import BlockState
from nybble.calibration.groups import trace_groups
from nybble.calibration.statistics import ChannelSizes, DriftMoments, GuidedMoments, InputSample, Range, SecondMoment
from nybble.calibration.trace import BlockCall, Tensors
from nybble.calibration.window import Batches, Known, Window
from nybble.core import ranks
from nybble.core.errors import DataError
from nybble.nn.kinds import Target, kind_of, read_by
from nybble.nn.swap import hold_dense
from nybble.qtensor import QuantParams
from nybble.quantizer import Quantizer

SAMPLE = 1024
"""Tokens of an input that are looked at for pictures."""
Gatherer = InputSample | SecondMoment | DriftMoments | GuidedMoments | ChannelSizes


class Asker(Protocol):
    """Who wants to see inputs: a solver, say; its members as :class:`nybble.solvers.Solver` describes them."""

    @property
    def chooses_inputs(self) -> bool:
        """Whether it finds the parameters of static input quantizers itself."""

    @property
    def most_tokens(self) -> int:
        """How many inputs it wants at most."""

    def needs(self, inputs: Quantizer | None) -> frozenset[str]:
        """Which of ``second_moment``, ``drift``, ``guided``, ``sizes``, ``inputs`` it reads, for such inputs."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Targets that read the same tensor under the same input quantizer; ``leader`` is the module to watch."""

    members: tuple[Target, ...]
    inputs: Quantizer | None

    @property
    def leader(self) -> str:
        """Name of the first module; of a table that an output head reads, the head's."""
        return self.members[0].head or self.members[0].name


def find_groups(
    block: nn.Module, targets: Sequence[Target], call: BlockCall, given: Tensors
) -> tuple[list[Group], list[str]]:
    """Targets that share an input, and names of targets that the block never called.

    Two layers that read the same tensor through different input quantizers, or kernels, are two groups.
    """
    by_name = {t.head or t.name: t for t in targets if t.matrices and not t.kind.fused}
    found: dict[tuple[str, str, str], list[Target]] = {}
    trace = trace_groups(block, call, given)
    for names in trace.groups:
        for name in names:
            if name in by_name:
                target = by_name[name]
                key = (names[0], str(target.rule.inputs), target.kind.cut(block.get_submodule(name)))
                found.setdefault(key, []).append(target)
    seen = {t.head or t.name for members in found.values() for t in members}
    groups = [Group(members=tuple(m), inputs=m[0].rule.inputs) for m in found.values()]
    return groups, [name for name in by_name if name not in seen]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What is known of a block's layers before they are solved.

    Attributes:
        groups: all linear targets. params: of static input quantizers, by the group's leader.
        moments: by leader; missing where nothing was seen. routed: by fused weight, one an expert.
        later: leaders of those who ask for their drift, to be seen by :func:`layer_moments` when their turn comes.
        drifts: by leader, once they were seen.
        guided: moments weighed by gradients, by target; of those who ask for a drift seen when that is.
        sizes: of the input's channels, by leader. routed_sizes: by fused weight, one an expert.
        samples: inputs themselves, by leader. looks: a few of them, for pictures.
    """

    groups: Sequence[Group]
    params: dict[str, QuantParams] = field(default_factory=dict)
    moments: dict[str, SecondMoment] = field(default_factory=dict)
    routed: dict[str, list[SecondMoment]] = field(default_factory=dict)
    later: list[str] = field(default_factory=list)
    drifts: dict[str, DriftMoments] = field(default_factory=dict)
    guided: dict[str, GuidedMoments] = field(default_factory=dict)
    sizes: dict[str, ChannelSizes] = field(default_factory=dict)
    routed_sizes: dict[str, list[ChannelSizes]] = field(default_factory=dict)
    samples: dict[str, InputSample] = field(default_factory=dict)
    looks: dict[str, InputSample] = field(default_factory=dict)


def see_nothing(targets: Sequence[Target]) -> Seen:
    """Without calibration: every linear target by itself."""
    return Seen(groups=[Group(members=(t,), inputs=t.rule.inputs) for t in targets if t.matrices and not t.kind.fused])


class _Gathering:
    """What is gathered of a block's layers: found in ``known``, or made and to be filled (``fresh``)."""

    def __init__(self, known: Known | None) -> None:
        self.known: Known = {} if known is None else known
        self.fresh: list[tuple[str, Gatherer]] = []

    def get(self, leader: str, kind: str, make: Callable[[], Any]) -> Any:
        """The gatherer of a kind at a module."""
        if (leader, kind) not in self.known:
            self.known[leader, kind] = made = make()
            self.fresh.append((leader, made))
        return self.known[leader, kind]


def see_block(window: Window, path: str, asker: Asker, looks: bool = False) -> Seen:
    """Run a block on its calibration inputs, once for ranges and once for moments where those are needed.

    Args:
        window: of one block, with real float weights; what is ``known`` of the block already is used, and added to.
        path: whose inputs.
        asker: says what it wants to see.
        looks: keep some inputs of every group, also where nothing else is gathered.

    Raises:
        DataError: a layer with static inputs was never called, or saw NaN.
    """
    state = window.block
    call, given = next(iter(window.batches(path)()))
    groups, uncalled = find_groups(state.module, state.targets, call, given)
    alone = [g for g in see_nothing(state.targets).groups if g.leader in uncalled]
    for group in alone:
        if group.inputs is not None and group.inputs.static:
            name = f"{state.prefix}{group.leader}"
            raise DataError(f"{name} was never called on the calibration data, so its activations have no scale.")
    gathering, tokens = _Gathering(window.known), window.calibration.tokens
    params = {} if asker.chooses_inputs else _ranges(window, groups, path, tokens, gathering.known)
    seen = Seen(groups=[*groups, *alone], params=params)
    own_rows = max((group.members[0].kind.rows_a_sample for group in groups), default=0)
    tokens = own_rows * window.calibration.samples if own_rows else tokens
    for group in groups:
        _ask(group, asker, seen, gathering, tokens)
        if "guided" in asker.needs(group.inputs):
            _ask_guided(state, group, window.calibration.guides, seen, gathering)
    for target in state.targets:
        if target.kind.fused and "second_moment" in asker.needs(None):
            seen.routed[target.name] = [SecondMoment(target.shape[1]) for _ in range(target.matrices)]
        if target.kind.fused and "sizes" in asker.needs(None):
            seen.routed_sizes[target.name] = [ChannelSizes(target.shape[1]) for _ in range(target.matrices)]
    if looks or seen.moments or seen.later or seen.sizes or seen.samples or seen.routed or own_rows:
        for group in groups:
            width, parts = group.members[0].shape[1], group.members[0].groups
            look = partial(InputSample, width, tokens, SAMPLE, parts)
            seen.looks[group.leader] = gathering.get(group.leader, "look", look)
        both = (seen.routed, seen.routed_sizes)
        routed: Routed = [(t, found[t.name]) for t in state.targets for found in both if t.name in found]
        _watch(window, gathering.fresh, routed, window.own(path), window.batches(path))
    return seen


def _ask(group: Group, asker: Asker, seen: Seen, gathering: _Gathering, tokens: int) -> None:
    """Put what is wanted of a group's input into ``seen``, still empty."""
    wanted = asker.needs(group.inputs) if any(t.rule.weights for t in group.members) else frozenset()
    leader, width, parts = group.leader, group.members[0].shape[1], group.members[0].groups
    if "drift" in wanted:
        seen.later.append(leader)
    elif "second_moment" in wanted:
        fixed = seen.params.get(leader)
        seen.moments[leader] = gathering.get(
            leader, f"moment {group.inputs} {fixed is None}", partial(SecondMoment, width, group.inputs, fixed, parts)
        )
    if "sizes" in wanted:
        seen.sizes[leader] = gathering.get(leader, "sizes", partial(ChannelSizes, width))
    if "inputs" in wanted:
        most = asker.most_tokens
        seen.samples[leader] = gathering.get(leader, f"inputs {most}", partial(InputSample, width, tokens, most, parts))


def _ask_guided(
    state: BlockState, group: Group, guides: Mapping[str, Tensor], seen: Seen, gathering: _Gathering
) -> None:
    """Put moments weighed by gradients into ``seen``, of those members whose gradients are known."""
    fixed = seen.params.get(group.leader)
    for target in group.members:
        guide = guides.get(f"{state.prefix}{target.name}")
        if guide is None or target.rule.weights is None or target.groups > 1:
            continue
        make = partial(GuidedMoments, target.shape[1], guide, group.inputs, fixed)
        if group.leader in seen.later:
            seen.guided[target.name] = make()
        else:
            key = f"guided {target.name} {guide.shape[1]} {group.inputs} {fixed is None}"
            seen.guided[target.name] = gathering.get(group.leader, key, make)


Inputs = tuple[Quantizer | None, QuantParams | None]
Routed = Sequence[tuple[Target, Sequence[Gatherer]]]


def layer_moments(
    window: Window,
    path: str,
    layers: Mapping[str, tuple[Target, Inputs]],
    beside: Sequence[tuple[str, GuidedMoments]] = (),
) -> tuple[dict[str, SecondMoment], dict[str, DriftMoments]]:
    """Of the inputs of some layers of a block; layers that were never called are missing.

    Where one path is run, the block is run in float. Where both are, what differs between them is gathered too: of the
    float block on the float path, and of the block as it stands, with what is installed so far, on the other. (What the
    layers in front have made up for is then no longer missing; of a block that is in float on both paths, every layer
    behind would make up for it once more.) So layers of which one reads what another gives are asked for one by one.

    Args:
        window: of one block.
        path: whose inputs, where one is run.
        layers: by name, with the quantizer that the input passes first and its parameters.
        beside: what else gathers the inputs of some of these.
    """
    state = window.block
    both = {"float", "quantized"} <= window.calibration.paths
    made = {name: (target.shape[1], inputs[0], inputs[1], target.groups) for name, (target, inputs) in layers.items()}
    moments = {name: SecondMoment(*options) for name, options in made.items()}
    drifts = {name: DriftMoments(*options) for name, options in made.items()} if both else {}
    if both:
        hold_dense(state.module, window.calibration.dtype)
        batches = partial(_both, state, list(drifts.items()), window.own("float"), window.own("quantized"))
        _watch(window, [*moments.items(), *drifts.items(), *beside], [], batches)
        hold_dense(state.module, None)
    else:
        with state.on("float"):
            _watch(window, [*moments.items(), *beside], [], window.own(path))
    return {name: moment for name, moment in moments.items() if moment.tokens}, drifts


def _ranges(window: Window, groups: Sequence[Group], path: str, tokens: int, known: Known) -> dict[str, QuantParams]:
    """Parameters of static input quantizers, by leader."""
    state = window.block
    static = [g for g in groups if g.inputs is not None and g.inputs.static]
    if not static:
        return {}
    fresh = {g.leader: Range(tokens * g.members[0].shape[1]) for g in static if (g.leader, "range") not in known}
    if fresh:
        _run(state.module, window.own(path), [(name, _entering(state, name, r.add)) for name, r in fresh.items()])
        for seen in fresh.values():
            seen.merge(window.calibration.device)
    known.update({(name, "range"): r for name, r in fresh.items()})
    ranges: dict[str, Any] = {g.leader: known[g.leader, "range"] for g in static}
    return {
        g.leader: ranges[g.leader].fit(g.inputs, f"{state.prefix}{g.leader}") for g in static if g.inputs is not None
    }


def see_channels(
    block: nn.Module, names: Sequence[str], batches: Batches, moments: bool = False
) -> dict[str, ChannelSizes]:
    """Sizes of the input channels of some modules, and second moments on demand; those never called are missing.

    Args:
        block: real, in float.
        names: of modules in it.
        batches: of this process's share.
        moments: with second moments.
    """
    found: dict[str, ChannelSizes] = {}
    device = next(block.parameters()).device

    def note(name: str) -> Callable[[Tensor], None]:
        def add(x: Tensor) -> None:
            if name not in found:
                found[name] = ChannelSizes(x.shape[-1], moments)
            found[name].add(x)

        return add

    _run(block, batches, [(name, note(name)) for name in names])
    for widths in ranks.gather({name: sizes.columns for name, sizes in found.items()}):
        for name, columns in widths.items():
            found.setdefault(name, ChannelSizes(columns, moments))
    called = [name for name in names if name in found]
    for name in called:
        found[name].merge(device)
    return {name: found[name] for name in called if found[name].tokens}


def _watch(
    window: Window,
    fresh: Sequence[tuple[str, Gatherer]],
    routed: Routed,
    batches: Batches,
    everyone: Batches | None = None,
) -> None:
    """Run the block as it stands once and let everything that gathers inputs gather them.

    Args:
        window: of one block.
        fresh: what gathers inputs of modules, empty.
        routed: what gathers those of fused weights, empty.
        batches: of this process's share.
        everyone: all, for samples of tokens that can't be put together of shares.
    """
    if not fresh and not routed:
        return
    state, adds = window.block, dict[str, list[Callable[[Tensor], None]]]()
    for name, part in fresh:
        adds.setdefault(name, []).append(part.add)
        if isinstance(part, InputSample):
            part.begin(window.before)
    watchers = [(name, _gatherer(state.float_module(name), each)) for name, each in adds.items()]
    with _watching_routed(state.module, routed):
        _run(state.module, batches, watchers)
    device = window.calibration.device
    again = [(name, part) for name, part in fresh if not part.merge(device)]
    for part in (part for _, parts in routed for part in parts):
        part.merge(device)
    if again and everyone is not None:
        _run(state.module, everyone, [(name, _gatherer(state.float_module(name), [p.add])) for name, p in again])


def _both(
    state: BlockState, drifts: Sequence[tuple[str, DriftMoments]], beside: Batches, batches: Batches
) -> Iterator[tuple[BlockCall, Tensors]]:
    """``batches``; before each is given out, the float block is run on the same one ``beside`` it."""
    watchers = [(name, _gatherer(state.float_module(name), [part.expect])) for name, part in drifts]
    for (call, given), found in zip(beside(), batches(), strict=True):
        with state.on("float") as block, _watching(block, watchers, call.mask):
            call.run(block, given)
        yield found
        for _, part in drifts:
            part.end_batch()


def _entering(state: BlockState, name: str, add: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """Shows the inputs of a float module as its quantizer gets them."""
    module = state.float_module(name)
    kind = kind_of(module)
    return add if kind is None else lambda x: add(kind.enters(module, x))


def _gatherer(module: nn.Module, adds: Sequence[Callable[[Tensor], None]]) -> Callable[[Tensor], None]:
    """Shows several the inputs of a float module, or of its stand-in, as rows that its matrix is multiplied with."""
    kind = kind_of(module)

    def watch(x: Tensor) -> None:
        rows = x if kind is None else kind.rows(module, x)
        for add in adds:
            add(rows)

    return watch


def _run(block: nn.Module, batches: Batches, watchers: Sequence[tuple[str, Callable[[Tensor], None]]]) -> None:
    """Run the block on all batches and show each watcher its module's inputs, but for those of padding tokens."""
    for call, given in batches():
        with _watching(block, watchers, call.mask):
            call.run(block, given)


@contextmanager
def _watching(
    block: nn.Module, watchers: Sequence[tuple[str, Callable[[Tensor], None]]], mask: Tensor | None
) -> Iterator[None]:
    """Show each watcher its module's inputs, but for those of tokens that the mask leaves out."""
    handles = []
    for name, watch in watchers:

        def see(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], watch: Callable[[Tensor], None] = watch
        ) -> None:
            x = read_by(module, args, kwargs)
            watch(x if mask is None or x.shape[:2] != mask.shape else x[mask])

        handles.append(block.get_submodule(name).register_forward_pre_hook(see, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _watching_routed(block: nn.Module, routed: Routed) -> Iterator[None]:
    """Let each matrix of fused targets gather the rows that are sent to it."""
    handles = []
    for target, gatherers in routed:

        def see(
            module: nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            target: Target = target,
            gatherers: Sequence[Gatherer] = gatherers,
        ) -> None:
            for number, rows in target.kind.routed(module, target.leaf, args, kwargs):
                gatherers[number].add(rows)

        handles.append(block.get_submodule(target.module).register_forward_pre_hook(see, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
