"""Before anything runs: which modules a scheme takes, and whether their shapes fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from nybble.core.errors import GranularityError, SchemeError, within
from nybble.kv_format import KVFormat
from nybble.models.adapter import Adapter, under
from nybble.nn.kinds import Kind, Target, look_alikes, targets_of
from nybble.nn.kinds.tied import check_shared
from nybble.nn.kv_model import KVRecord, kv_of_scheme, to_calibrate
from nybble.nn.read_weights import read_weights
from nybble.quantizer import Quantizer
from nybble.scheme import Matches, Scheme, matches, split_apart
from nybble.solvers import Solver


@dataclass(frozen=True)
class Plan:
    """What will be done.

    Attributes:
        blocks: for each block, its targets with names relative to the block. outside: targets in no block.
        counts: pattern -> modules. ignored: names that ``ignore`` took out. read: names of modules that stay in float,
            as code of the model reads their weights instead of calling them.
        products: for each block, its targets without a matrix: attentions whose operands are to be rounded.
        kv: what the model will cache in. cached: for each block its attentions, by their names in it, whose scales of
            keys and values are still to be calibrated.
        apart: name -> class of what a rule takes and no kind claims: it computes something else with its weight.
    """

    blocks: tuple[tuple[Target, ...], ...]
    outside: tuple[Target, ...]
    counts: Mapping[str, int]
    ignored: tuple[str, ...]
    products: tuple[tuple[Target, ...], ...] = ()
    kv: KVRecord | None = None
    apart: Mapping[str, str] = field(default_factory=dict)
    read: tuple[str, ...] = ()
    cached: tuple[Mapping[str, KVFormat], ...] = ()

    @property
    def targets(self) -> int:
        """How many weights."""
        return sum(len(block) for block in self.blocks) + len(self.outside)

    @property
    def kinds(self) -> list[Kind]:
        """The kinds of all targets."""
        everything = [*self.blocks, *self.products, self.outside]
        return list(dict.fromkeys(target.kind for targets in everything for target in targets))

    @property
    def uneven(self) -> tuple[str, ...]:
        """Names and columns of weights whose last group is shorter than the others."""
        lines = [(t, t.rule.weights) for targets in (*self.blocks, self.outside) for t in targets]
        short = [t for t, line in lines if line is not None and line.granularity.uneven(t.shape)]
        return tuple(dict.fromkeys(f"{t.name} ({t.shape[1]} columns)" for t in short))  # of many blocks once

    def needs(self, solver: Solver) -> frozenset[str]:
        """What must be seen: what the solver needs, and ``ranges`` for static inputs. Of a table nobody sees inputs."""
        rules = {t.rule for block in self.blocks for t in block}
        rules |= {t.rule for t in self.outside if t.kind.shares_input or t.head}
        static = any(rule.inputs is not None and rule.inputs.static for rule in rules)
        solved = [solver.needs(rule.inputs) for rule in rules if rule.weights is not None]
        operands = [target.rule.matmuls for block in self.products for target in block]
        static |= any(matmuls is not None and matmuls.static for matmuls in operands)
        static |= any(self.cached)
        return frozenset({"ranges"} if static else ()).union(*solved)


def make_plan(model: nn.Module, adapter: Adapter, scheme: Scheme, solver: Solver) -> Plan:
    """Match the scheme and check every target against its quantizers.

    Args:
        model: may be on the meta device.
        adapter: the model's.
        scheme: what to quantize and how.
        solver: what it must be able to take.

    Raises:
        SchemeError: a pattern without a match; a tied head; a quantizer that the solver or a module can't take.
        GranularityError: columns that a group doesn't divide; names the layer and the sizes that fit.
    """
    known = targets_of(model)
    modules = {name: model.get_submodule(target.module) for name, target in known.items()}
    classes = {n: t.kind.class_names(modules[n], adapter.convolutional) for n, t in known.items()}
    alike = look_alikes(model, adapter.convolutional)
    found, apart = split_apart(_match(model, adapter, scheme, classes | alike), alike)
    tied = adapter.tied_groups(model)
    targets: list[Target] = []
    for name, rule in found.rules.items():
        target = replace(known[name], rule=rule)
        with within(name):
            target.kind.check(target, modules[name])
            _check(target, solver)
            target = _fitted(target)
            others = _sharing(target, tied)
            planned = target.kind.tied(target, model, others) if others else target
            if planned is not None:
                targets.append(planned)
    check_shared(targets, found)
    outside = tuple(t for t in targets if not adapter.inside(t.name) and t.matrices)
    prefixes = [under(name) for name in adapter.block_names(model)]
    inside = [[replace(t, name=t.name.removeprefix(p)) for t in targets if t.name.startswith(p)] for p in prefixes]
    blocks = tuple(tuple(t for t in block if t.matrices) for block in inside)
    products = tuple(tuple(t for t in block if t.rule.matmuls is not None) for block in inside)
    kv = kv_of_scheme(model, scheme, found.rules)
    cached = _cached(to_calibrate(model, kv), prefixes)
    return Plan(blocks, outside, found.counts, found.ignored, products, kv, apart, found.fixed, cached)


def _cached(formats: Mapping[str, KVFormat], prefixes: Sequence[str]) -> tuple[Mapping[str, KVFormat], ...]:
    """Those of each block, by their names in it."""
    found = tuple({n.removeprefix(p): kv for n, kv in formats.items() if n.startswith(p)} for p in prefixes)
    inside = sum(map(len, found))
    if inside != len(formats):
        raise SchemeError(
            f"the KV cache {next(iter(formats.values()))}: a layer outside of the blocks isn't calibrated."
        )
    return found


def _sharing(target: Target, tied: list[tuple[str, ...]]) -> list[str]:
    """Full names of the parameters that are a target's own under another name."""
    own = set(target.parameters)
    return [name for group in tied if own & set(group) for name in group if name not in own]


def _match(model: nn.Module, adapter: Adapter, scheme: Scheme, classes: Mapping[str, tuple[str, ...]]) -> Matches:
    """The scheme's rules for the model's modules.

    ``lm_head`` in ``ignore``, as by default, means the output head whatever its name, what the adapter keeps in float
    as one keeps a head (:attr:`~nybble.models.adapter.Adapter.kept`), every other layer that reads the
    table of an embedding (a model may predict words and entities, or have heads in its parts), and what else stands
    behind the blocks (a pooler, a classifier) where a class of targets reached it and its rule needs calibrated inputs,
    which are there for blocks only. Without it such a module is an error.
    """
    fixed = _with_tied(model, read_weights(model))
    if "lm_head" not in scheme.ignore:
        return scheme.match(classes, fixed)
    get_head = getattr(model, "get_output_embeddings", lambda: None)
    head = get_head()
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    heads = {
        name
        for name, module in model.named_modules()
        if name not in ("", "lm_head")
        and not isinstance(module, nn.Embedding)  # which FSMT calls its output embeddings
        and (module is head or (name in classes and _reads_table(module, tables)))
    }
    heads |= {name for name in classes if adapter.keeps(name)}
    found = scheme.match({name: kinds for name, kinds in classes.items() if name not in heads}, fixed)
    named = {
        target for rule in scheme.rules for target in rule.targets if target.startswith("re:") or target in classes
    }
    behind = {
        name
        for name, rule in found.rules.items()
        if not adapter.inside(name)
        and rule.inputs is not None
        and rule.inputs.static
        and not any(matches(target, name, ()) for target in named)
    }
    rules = {name: rule for name, rule in found.rules.items() if name not in behind}
    return Matches(rules, found.counts, (*found.ignored, *sorted(heads & set(classes)), *sorted(behind)), found.fixed)


def _with_tied(model: nn.Module, names: set[str]) -> set[str]:
    """With every module that has the weight of one of these."""
    weights = {name: getattr(module, "weight", None) for name, module in model.named_modules()}
    read = {id(weights[name]) for name in names}
    return names | {name for name, weight in weights.items() if weight is not None and id(weight) in read}


def _reads_table(module: nn.Module, tables: set[int]) -> bool:
    """Whether a layer's weight is the table of an embedding."""
    return id(getattr(module, "weight", None)) in tables


def _fitted(target: Target) -> Target:
    """The target with its weight's granularity as plain as its shape allows: files and reports say what is there."""
    rule = target.rule
    if rule.weights is None:
        return target
    return replace(target, rule=replace(rule, weights=rule.weights.fitted(target.shape)))


def _check_cut(quantizer: Quantizer, shape: tuple[int, ...]) -> None:
    """Raise GranularityError where a shape can't be cut as a quantizer asks, or its scales as theirs does."""
    quantizer.granularity.check(shape)
    if quantizer.granularity.factored:
        return
    for word in ("scale_format", "offset_format"):
        inner = getattr(quantizer, word)
        if isinstance(inner, Quantizer):
            try:
                _check_cut(inner, quantizer.granularity.scale_shape(shape))
            except GranularityError as error:
                raise GranularityError(f"{word}=({inner}): the scales are a matrix of {error}") from error


def _check(target: Target, solver: Solver) -> None:
    """Raise where the solver, or any weight, can't have the quantizers of a rule."""
    rule = target.rule
    if rule.weights is not None:
        solver.check_shape(*target.shape)
        _check_cut(solver.quantizer_for(rule.weights), target.shape)
        if rule.weights.static:
            raise SchemeError("'static' is for activations; weights always keep their own scales.")
        if not rule.weights.format.signed and not (rule.weights.scale.needs_integer or rule.weights.scale.has_offset):
            raise SchemeError(
                f"weights are signed and {rule.weights.format} is not; add symmetric=false or use a signed format."
            )
    elif rule.inputs is not None and rule.inputs.static and solver.chooses_inputs:
        raise SchemeError("this recipe searches inputs together with weights, and this rule has no weights.")
