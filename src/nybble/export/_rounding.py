"""What weights are rounded to where a target can't hold them as they are: a line that is asked for, or the nearest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.calibration.error import relative_error
from nybble.core.errors import GranularityError, NybbleError, SchemeError, UsageError
from nybble.export import ExportTarget, Facts
from nybble.export._fused import fused_groups
from nybble.export._modules import without_place
from nybble.export._recodings import EXACT, NUDGED, ROUNDING, Recoding, seen_by
from nybble.export._rounded import RoundedSource
from nybble.export._source import Source
from nybble.models.adapter import adapter_for
from nybble.models.sources.layouts._ct_args import in_words
from nybble.nn.kinds import targets_of
from nybble.qtensor import QTensor
from nybble.quantizer import Quantizer
from nybble.scheme import Rule, Scheme

AUTO = "auto"
_ROWS = 128  # of a trial; those of the largest blocks that a target names
_MORE = 0.6  # bits that the nearest may have more than what there is: the scales of smaller groups
_SHARED = ("group=32", "group=32 symmetric=false", "channel")
_FLOATS = ("nvfp4", "mxfp4", "mxfp6", "mxfp8", "float8_e4m3fn channel", "float8_e4m3fn tensor")
_USUAL = (*(f"int{bits} {shared}" for bits in (2, 3, 4, 5, 6, 8) for shared in _SHARED), *_FLOATS)


@dataclass(frozen=True, kw_only=True)
class Changed:
    """Layers that are told in other words, or get another quantizer.

    Attributes:
        layers: names. came: what they are. to: what they become. rounds: whether their values change. kept: whether
            every code is kept. beside: what else those were that runtimes join with them, for which they all got one
            line; empty where there was nothing else.
    """

    layers: tuple[str, ...]
    came: str
    to: str
    rounds: bool
    kept: bool
    beside: str = ""


def recodings(
    source: Source, bad: Callable[[Source], Sequence[str]], *, nudging: bool, rounding: bool
) -> dict[str, Recoding]:
    """How layers that a target can't hold are told in its words, every code kept.

    Args:
        source: what there is.
        bad: names of the layers of a source that the target can't hold.
        nudging: whether values may move by a float32's last bit for that.
        rounding: whether scales may be rounded.
    """
    found: dict[str, Recoding] = {}
    for recoding in (*EXACT, *(NUDGED if nudging else ()), *(ROUNDING if rounding else ())):
        left = bad(RoundedSource(source, {}, (), found) if found else source)
        fits = {name: recoding for name in left if name not in found and _fits(source, recoding, name)}
        if fits:
            still = set(bad(RoundedSource(source, {}, (), found | fits)))
            found |= {name: recoding for name in fits if name not in still}
    return found


def _fits(source: Source, recoding: Recoding, name: str) -> bool:
    layer = source.layers[name]
    given = (seen_by(recoding, source, layer, prefix) for prefix in layer.weights)
    return bool(layer.weights) and all(recoding.make(weight) is not None for weight in given)


def facts_of(source: Source) -> Facts:
    """What a target's ``constrain`` asks of a model that is quantized already."""
    model = source.skeleton()
    known = targets_of(model)
    convolutional = adapter_for(model).convolutional
    classes = {n: t.kind.class_names(model.get_submodule(t.module), convolutional) for n, t in known.items()}
    nowhere = without_place(model, known)
    return Facts(
        config=source.config, dtype=source.dtype, targets=known, classes=classes, model=model, without_place=nowhere
    )  # fmt: skip


def rounded(
    source: Source, target: ExportTarget, names: Sequence[str], line: str, kept: Mapping[str, Recoding]
) -> RoundedSource:
    """The source with weights that the target holds.

    Args:
        source: what there is.
        target: where it goes.
        names: of layers that it can't hold; siblings that runtimes join come with them where they have to.
        line: a quantizer line for all of them; ``auto``: for each what the target holds in about as many bits, with
            the least error on the first of its kind. Embeddings that it holds in no line at all become floats.
        kept: layers whose codes stay, in other words.

    Raises:
        UsageError: no such line. SchemeError: the target can't hold that either.
    """
    facts = facts_of(source)
    wanted = list(dict.fromkeys(name for name in names if name in source.layers and source.layers[name].weights))
    tables = [
        name for name in wanted if "Embedding" in facts.classes[name] and not any(_held(source, target, facts, [name]))
    ]
    wanted = [name for name in wanted if name not in tables]
    beside = [name for group in fused_groups(source.layers) if set(group) & set(wanted) for name in group]
    for layers in (wanted, list(dict.fromkeys([*wanted, *beside]))):
        try:
            chosen = _auto(source, target, facts, layers) if line == AUTO else dict.fromkeys(layers, Quantizer(line))
            scheme = target.constrain(_scheme(chosen), facts)
        except (UsageError, SchemeError, GranularityError):
            if set(beside) <= set(layers):
                raise
            continue
        rules = scheme.match(facts.classes).rules
        final = {name: rule.weights for name, rule in rules.items() if rule.weights is not None}
        left = {name: recoding for name, recoding in kept.items() if name not in final}
        left = {name: recoding for name, recoding in left.items() if name not in tables}
        return RoundedSource(source, final, scheme.together, left, tables)
    raise AssertionError("one of the two is tried last")


def table(source: RoundedSource, before: Source) -> list[Changed]:
    """Which layers go from what to what, alike ones in one row."""
    found: dict[tuple[str, str, bool, bool, str], list[str]] = {}
    words = {name: in_words(_first(before, name)[1]) for name, layer in before.layers.items() if layer.weights}
    joined = {name: group for group in fused_groups(source.quantizers) for name in group}
    for name, came in words.items():
        quantizer, recoding = source.quantizers.get(name), source.recodings.get(name)
        if name in source.unpacked:
            found.setdefault((came, str(source.dtype).removeprefix("torch."), True, False, ""), []).append(name)
        if quantizer is None and recoding is None:
            continue
        beside = ", ".join(dict.fromkeys(words[one] for one in joined.get(name, ()) if words[one] != came))
        to, rounds = (recoding.words, recoding.rounds) if recoding is not None else (str(quantizer), True)
        found.setdefault((came, to, rounds, recoding is not None, beside), []).append(name)
    return [
        Changed(layers=tuple(names), came=came, to=to, rounds=rounds, kept=kept, beside=beside)
        for (came, to, rounds, kept, beside), names in found.items()
    ]


def _scheme(chosen: Mapping[str, Quantizer]) -> Scheme:
    lines: dict[Quantizer, list[str]] = {}
    for name, quantizer in chosen.items():
        lines.setdefault(quantizer, []).append(name)
    return Scheme(rules=tuple(Rule(targets=tuple(n), weights=q) for q, n in lines.items()), ignore=())


def _auto(source: Source, target: ExportTarget, facts: Facts, names: Sequence[str]) -> dict[str, Quantizer]:
    """The nearest of each layer; one for what runtimes join, and for those alike, found on the first of them."""
    joined = {name: group for group in fused_groups(names) for name in group}
    alike: dict[object, dict[tuple[str, ...], None]] = {}
    for name in names:
        group = joined.get(name, (name,))
        what = tuple((in_words(_first(source, one)[1]), tuple(facts.classes[one])) for one in group)
        alike.setdefault(what, {})[group] = None
    found: dict[str, Quantizer] = {}
    for groups in alike.values():
        some = [name for group in groups for name in group]
        found |= dict.fromkeys(some, _nearest(source, target, facts, some, next(iter(groups))))
    return found


def _first(source: Source, name: str) -> tuple[str, QTensor]:
    """Prefix and description of a layer's weight; of experts those of the first."""
    return next(iter(source.layers[name].weights.items()))


def _nearest(
    source: Source, target: ExportTarget, facts: Facts, names: Sequence[str], first: Sequence[str]
) -> Quantizer:
    """What the target holds of all of ``names`` in about as many bits as the widest of ``first`` has, the best there.

    Args:
        source: what there is.
        target: where it goes.
        facts: of the model.
        names: of layers.
        first: those of them on which errors are measured: a layer, or all that runtimes join with it.
    """
    held = list(_held(source, target, facts, names))
    if not held:
        line, why = _refused(target, facts, names)
        other = set(names) - set(facts.without_place)  # no line makes another module of the rest
        way_out = "Give a line that does with --round LINE, or choose another target." if other else _ELSEWHERE
        raise UsageError(
            f"{target.summary}: none of the usual lines fits {', '.join(names[:3])}; of {line!r} it says: {why} "
            f"{way_out}"
        )
    bits = max(_first(source, name)[1].bits_per_element() for name in first)
    close = [quantizer for size, quantizer in held if size <= bits + _MORE]
    if not close:
        return min(held, key=lambda pair: pair[0])[1]
    values = [source.weight(source.layers[n], _first(source, n)[0]).dequantize()[:_ROWS].clone() for n in first]
    return min(close, key=lambda quantizer: sum(_error(matrix, quantizer) for matrix in values))


_ELSEWHERE = "Choose another target."


def _refused(target: ExportTarget, facts: Facts, names: Sequence[str]) -> tuple[str, str]:
    """A line that is usual for a target, and what keeps it from holding that."""
    line = target.usual.weights or "int4 group=32"
    try:
        target.constrain(_scheme(dict.fromkeys(names, Quantizer(line))), facts)
    except NybbleError as error:
        return line, str(error)
    return line, "it doesn't fit the shapes."


def _held(
    source: Source, target: ExportTarget, facts: Facts, names: Sequence[str]
) -> Iterator[tuple[float, Quantizer]]:
    """The usual lines that a target holds of all of ``names``, behind their bits."""
    shapes = {_first(source, name)[1].shape for name in names}
    for line in dict.fromkeys([*(row.weights for row in target.takes), *_USUAL]):
        try:
            quantizer = Quantizer(line)
            trials = [quantizer.quantize(torch.empty(shape, device="meta")) for shape in shapes]
            target.constrain(_scheme(dict.fromkeys(names, quantizer)), facts)
        except NybbleError:
            continue
        yield max(trial.bits_per_element() for trial in trials), quantizer


def _error(values: Tensor, quantizer: Quantizer) -> float:
    return relative_error(values, quantizer.quantize(values).dequantize(), None)
