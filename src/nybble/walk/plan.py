"""Before anything runs: which modules a scheme takes, and whether their shapes fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from nybble.core.errors import GranularityError, SchemeError, within
from nybble.granularity import PerPlane, PerTensor, Shifted
from nybble.models.adapter import Adapter
from nybble.models.experts import expert_weights, find_experts
from nybble.nn.activation import check_static
from nybble.nn.attention import attentions
from nybble.nn.conv import is_conv
from nybble.nn.kinds import Product, Target
from nybble.nn.swap import class_names, matrix_of
from nybble.quantizer import Quantizer
from nybble.scheme import Matches, Rule, Scheme, matches
from nybble.solvers import Solver


@dataclass(frozen=True)
class Plan:
    """What will be done.

    Attributes:
        blocks: for each block, its targets with names relative to the block. outside: targets in no block.
        counts: pattern -> modules. ignored: names that ``ignore`` took out.
        products: for each block, its attentions with rounded operands.
    """

    blocks: tuple[tuple[Target, ...], ...]
    outside: tuple[Target, ...]
    counts: Mapping[str, int]
    ignored: tuple[str, ...]
    products: tuple[tuple[Product, ...], ...] = ()

    @property
    def targets(self) -> int:
        """How many weights."""
        return sum(len(block) for block in self.blocks) + len(self.outside)

    @property
    def experts(self) -> bool:
        """Whether any weight is a fused one of experts."""
        return any(t.experts for block in self.blocks for t in block)

    def needs(self, solver: Solver) -> frozenset[str]:
        """What must be seen of the blocks: what the solver needs, and ``ranges`` for static inputs."""
        rules = {t.rule for block in self.blocks for t in block}
        static = any(rule.inputs is not None and rule.inputs.static for rule in rules)
        solved = [solver.needs(rule.inputs) for rule in rules if rule.weights is not None]
        static |= any(product.quantizer.static for block in self.products for product in block)
        return frozenset({"ranges"} if static else ()).union(*solved)


def make_plan(model: nn.Module, adapter: Adapter, scheme: Scheme, solver: Solver) -> Plan:
    """Match the scheme and check every weight against its quantizers.

    Args:
        model: may be on the meta device.
        adapter: the model's.
        scheme: what to quantize and how.
        solver: what it must be able to take.

    Raises:
        SchemeError: a pattern without a match; a tied head; a quantizer that the solver or a module can't take.
        GranularityError: columns that a group doesn't divide; names the layer and the sizes that fit.
    """
    shapes: dict[str, tuple[tuple[int, int], int]] = {}
    classes: dict[str, tuple[str, ...]] = {}
    for name, module in model.named_modules():
        matrix = matrix_of(module)
        if matrix is not None:
            more = ("Linear",) if adapter.convolutional and is_conv(module) else ()
            shapes[name], classes[name] = ((matrix.shape[0], matrix.shape[1]), 0), (*class_names(module), *more)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            rows, width = module.weight.shape
            shapes[name], classes[name] = ((rows, width), 0), class_names(module)
    for path, module in find_experts(model):
        for weight in expert_weights(module):
            full = f"{path}.{weight.name}"
            shapes[full] = ((weight.out_features, weight.in_features), weight.experts)
            classes[full] = (type(module).__name__, "Experts", "Linear")
    for name, module in attentions(model):
        classes.setdefault(name, (type(module).__name__, "Attention"))
    found = _match(model, adapter, scheme, classes)
    _check_kinds(found.rules, shapes)
    targets = {n: Target(n, rule, *shapes[n]) for n, rule in found.rules.items() if n in shapes}
    targets = {n: _embedding(t, model, adapter) for n, t in targets.items()}
    targets = {n: _conv(t, model) for n, t in targets.items()}
    products = [Product(n, rule.matmuls) for n, rule in found.rules.items() if rule.matmuls is not None]
    tied = {n.removesuffix(".weight") for group in adapter.tied_groups(model) for n in group}
    for target in targets.values():
        with within(target.name):
            _check(target, solver)
            if target.name in tied and not target.embedding:
                raise SchemeError(
                    "its weight is tied to the embeddings. Add it to ignore, or quantize the one table of both: a rule "
                    "with targets: [Embedding]."
                )
    prefixes = [f"{name}." for name in adapter.block_names(model)]
    blocks = tuple(
        tuple(replace(t, name=t.name.removeprefix(p)) for t in targets.values() if t.name.startswith(p))
        for p in prefixes
    )
    outside = tuple(t for t in targets.values() if not adapter.inside(t.name))
    for target in outside:
        if target.rule.inputs is not None and target.rule.inputs.static:
            raise SchemeError(
                f"{target.name} is outside the blocks, where no static activations are calibrated; "
                "use a dynamic quantizer."
            )
    inside = tuple(
        tuple(Product(x.name.removeprefix(p), x.quantizer) for x in products if x.name.startswith(p)) for p in prefixes
    )
    return Plan(blocks, outside, found.counts, found.ignored, inside)


def _match(model: nn.Module, adapter: Adapter, scheme: Scheme, classes: Mapping[str, tuple[str, ...]]) -> Matches:
    """The scheme's rules for the model's modules.

    ``lm_head`` in ``ignore``, as by default, means the output head whatever its name, and what else stands behind the
    blocks (a pooler, a classifier) where a class of targets reached it and its rule needs calibrated inputs, which are
    there for blocks only. Without it such a module is an error.
    """
    if "lm_head" not in scheme.ignore:
        return scheme.match(classes)
    get_head = getattr(model, "get_output_embeddings", lambda: None)
    head = get_head()
    heads = {name for name, module in model.named_modules() if module is head and name not in ("", "lm_head")}
    found = scheme.match({name: kinds for name, kinds in classes.items() if name not in heads})
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
    return Matches(rules, found.counts, (*found.ignored, *sorted(heads & set(classes)), *sorted(behind)))


def _embedding(target: Target, model: nn.Module, adapter: Adapter) -> Target:
    """The target as an embedding, with the head that shares its table; others as they are.

    Raises:
        SchemeError: an embedding that isn't a plain one, or whose inputs (numbers of tokens) were to be quantized.
    """
    module = model.get_submodule(target.name) if not target.experts else None
    if not isinstance(module, nn.Embedding):
        return target
    if type(module) is not nn.Embedding:
        raise SchemeError(f"{target.name} is a {type(module).__name__}, which does more than look up rows; ignore it.")
    if target.rule.inputs is not None or target.rule.outputs is not None:
        raise SchemeError(f"{target.name} is an embedding: its rule has weights only. Give it a rule of its own.")
    names = next((g for g in adapter.tied_groups(model) if f"{target.name}.weight" in g), ())
    others = [n.removesuffix(".weight") for n in names if n != f"{target.name}.weight"]
    heads = [n for n in others if matrix_of(model.get_submodule(n)) is not None]
    if len(heads) != len(others) or len(heads) > 1:
        raise SchemeError(f"{target.name} shares its table with {', '.join(others)}; that is not supported. Ignore it.")
    return replace(target, embedding=True, head=heads[0] if heads else "")


def _conv(target: Target, model: nn.Module) -> Target:
    """The target as a convolution; others as they are."""
    module: Any = None if target.experts else model.get_submodule(target.name)
    return replace(target, conv=True, groups=module.groups) if module is not None and is_conv(module) else target


def _check_kinds(rules: Mapping[str, Rule], shapes: Mapping[str, object]) -> None:
    """Matmuls are of attentions, weights of linears: a rule that reaches the other kind says what it can't do."""
    for name, rule in rules.items():
        if (rule.matmuls is None) != (name in shapes):
            what = "a layer with a weight" if name in shapes else "an attention, which has products of activations only"
            raise SchemeError(f"{name} is {what}; its rule is for the other kind. Change the rule's targets.")
        if rule.matmuls is None:
            continue
        if isinstance(rule.matmuls.granularity, Shifted):
            raise SchemeError(
                f"{name}: shifted columns need a weight that takes the shifts; matmuls have none. Write 'tensor'."
            )
        check_static(rule.matmuls)


def _check(target: Target, solver: Solver) -> None:
    rule, (_, columns) = target.rule, target.shape
    if rule.weights is not None:
        solver.quantizer_for(rule.weights).granularity.check(target.shape)
        if rule.weights.static:
            raise SchemeError("'static' is for activations; weights always keep their own scales.")
        if not rule.weights.format.signed and not (rule.weights.scale.needs_integer or rule.weights.scale.has_offset):
            raise SchemeError(
                f"weights are signed and {rule.weights.format} is not; add symmetric=false or use a signed format."
            )
    for side, width in ((rule.inputs, columns), (rule.outputs, target.shape[0])):
        if side is None:
            continue
        if target.experts:
            raise SchemeError(
                "fused experts take quantized weights only, and this rule quantizes activations. Give them a rule of "
                "their own before it (targets: [Experts]), or leave them in float (--ignore Experts)."
            )
        check_static(side)
        if target.conv and type(side.granularity) not in (PerTensor, PerPlane):
            raise SchemeError(
                f"activations of a convolution can't have the scales of {side}: one value meets many kernel positions. "
                "Write 'tensor', or 'plane' for one scale for each channel of each image."
            )
        if side is rule.inputs and side.static and rule.weights is None and solver.chooses_inputs:
            raise SchemeError("this recipe searches inputs together with weights, and this rule has no weights.")
        try:
            side.granularity.check((1, 8, width))
        except GranularityError as error:
            raise GranularityError(f"activations: {error}") from error
