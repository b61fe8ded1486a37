"""What of a recipe gives way to the model: what its author left to it, each with a line that says so.

A transform with ``optional: true`` is left out of a model in which it finds nothing. ``convolutions:``, a line or
``none``, is what convolutions' inputs get where those of the scheme can't be theirs (a scale for every group of
channels, or token); groups of their weights may be short then, as few have columns that a power of two divides.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nybble.core.errors import ModelError, SchemeError
from nybble.models.adapter import Adapter
from nybble.nn.kinds import kind_of
from nybble.quantizer import Quantizer
from nybble.recipe import FLOAT, Recipe, Step
from nybble.scheme import Rule
from nybble.transforms import make_transform

CONV = "Conv"


def giving_way(model: Any, adapter: Adapter, recipe: Recipe) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe as it is for this model, and a line for each thing that is otherwise.

    Args:
        model: on any device, the meta device too.
        adapter: the model's.
        recipe: with what may give way.
    """
    kept, lines = list[Step](), list[str]()
    for step in recipe.steps:
        reason = _missing(model, adapter, step) if step.kind == "transform" else ""
        if reason:
            lines.append(f"left out: {reason}")
        else:
            kept.append(step)
    found = replace(recipe, steps=tuple(kept)) if lines else recipe
    return _convolved(model, found, lines) if adapter.convolutional and recipe.convolutions else (found, tuple(lines))


def _missing(model: Any, adapter: Adapter, step: Step) -> str:
    """Why an optional transform finds nothing; empty where it does, or isn't optional."""
    transform = make_transform(step.name, step.options)
    if not transform.optional:
        return ""
    try:
        transform.check(step.name, adapter, model)
    except ModelError as error:
        return str(error).partition(". Take a recipe")[0].rstrip(".")
    return ""


def _convolved(model: Any, recipe: Recipe, lines: list[str]) -> tuple[Recipe, tuple[str, ...]]:
    """With a rule of their own for convolutions, in front of each whose inputs can't be theirs."""
    kinds = {kind for module in model.modules() if (kind := kind_of(module)) is not None and CONV in kind.classes}
    inputs = None if recipe.convolutions == FLOAT else Quantizer(recipe.convolutions)
    rules, lines = list[Rule](), list(lines)
    for rule in recipe.scheme.rules:
        reason = _refused(kinds, rule) if "Linear" in rule.targets else ""
        if reason:
            weights = rule.weights and _short(rule.weights)
            rules.append(replace(rule, targets=(CONV,), weights=weights, inputs=inputs))
            said = "stay in float" if inputs is None else f"get {inputs}"
            lines.append(f"inputs of convolutions {said}: {reason}")
        rules.append(rule)
    return recipe.with_scheme(replace(recipe.scheme, rules=tuple(rules))), tuple(lines)


def _refused(kinds: set[Any], rule: Rule) -> str:
    if rule.inputs is None:
        return ""
    try:
        for kind in kinds:
            kind.check_activations(rule.inputs)
    except SchemeError as error:
        return str(error).partition(". Write")[0]
    return ""


def _short(weights: Quantizer) -> Quantizer:
    """The quantizer with groups that may end in a shorter one."""
    return weights.replace(pad=True) if "group" in str(weights.granularity) else weights
