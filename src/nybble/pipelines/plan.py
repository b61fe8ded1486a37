"""Before anything runs: which modules a scheme takes, and whether their shapes fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from nybble.core.errors import GranularityError, SchemeError, within
from nybble.granularity import Shifted
from nybble.models.adapter import Adapter
from nybble.models.experts import expert_weights, find_experts
from nybble.nn.activation import check_static
from nybble.nn.attention import attentions
from nybble.nn.swap import class_names, matrix_of
from nybble.quantizer import Quantizer
from nybble.scheme import Rule, Scheme
from nybble.solvers import Solver


@dataclass(frozen=True)
class Target:
    """A weight to be quantized: a linear module, or a fused parameter with a matrix for each expert.

    ``shape``: [out, in] of one matrix. ``experts``: how many, 0 for a linear module.
    """

    name: str
    rule: Rule
    shape: tuple[int, int]
    experts: int = 0


@dataclass(frozen=True)
class Product:
    """An attention whose operands are to be rounded: its name, and their quantizer."""

    name: str
    quantizer: Quantizer


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
            shapes[name], classes[name] = ((matrix.shape[0], matrix.shape[1]), 0), class_names(module)
    for path, module in find_experts(model):
        for weight in expert_weights(module):
            full = f"{path}.{weight.name}"
            shapes[full] = ((weight.out_features, weight.in_features), weight.experts)
            classes[full] = (type(module).__name__, "Experts", "Linear")
    for name, module in attentions(model):
        classes.setdefault(name, (type(module).__name__, "Attention"))
    found = scheme.match(classes)
    _check_kinds(found.rules, shapes)
    targets = {n: Target(n, rule, *shapes[n]) for n, rule in found.rules.items() if n in shapes}
    products = [Product(n, rule.matmuls) for n, rule in found.rules.items() if rule.matmuls is not None]
    tied = {n.removesuffix(".weight") for group in adapter.tied_groups(model) for n in group}
    for target in targets.values():
        with within(target.name):
            _check(target, solver)
            if target.name in tied:
                raise SchemeError("its weight is tied to the embeddings, which stay in float; add it to ignore.")
    prefixes = [f"{name}." for name in adapter.block_names(model)]
    blocks = tuple(
        tuple(
            Target(t.name.removeprefix(p), t.rule, t.shape, t.experts) for t in targets.values() if t.name.startswith(p)
        )
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
        try:
            side.granularity.check((1, 8, width))
        except GranularityError as error:
            raise GranularityError(f"activations: {error}") from error
