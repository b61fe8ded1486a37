"""From what a person typed to a recipe over a scheme."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from nybble.core.errors import SchemeError, UsageError, within
from nybble.kv_format import KVFormat
from nybble.quantizer import Quantizer
from nybble.recipe import Recipe, load_recipe, read_yaml
from nybble.scheme import Rule, Scheme, parse_scheme
from nybble.walk.steps.make import check_quick


def build_recipe(
    name: str,
    *,
    scheme: str | None = None,
    weights: str | None = None,
    activations: str | None = None,
    kv: str | None = None,
    embeddings: str | None = None,
    matmuls: str | None = None,
    ignore: Sequence[str] = (),
    effort: str = "full",
) -> Recipe:
    """A recipe by name with the command line's changes to its scheme.

    Raises:
        UsageError, SchemeError: unknown names, contradictions, or what no step can do.
    """
    recipe = load_recipe(name)
    check_quick(recipe)
    recipe = recipe.with_effort(effort)
    cached = None if kv is None else KVFormat.parse(kv)
    if scheme is not None and (weights or activations):
        raise UsageError("--scheme says everything; give either it or --weights and --activations.")
    chosen = recipe.scheme if scheme is None else read_scheme(scheme)
    if weights or activations:
        chosen = _override(chosen, weights, activations, anything=cached is not None and cached.stores)
    extra = []
    if embeddings is not None:
        extra.append(Rule(targets=("Embedding",), weights=Quantizer(embeddings)))
    if matmuls is not None:
        extra.append(Rule(targets=("Attention",), matmuls=Quantizer(matmuls)))
    if extra:
        chosen = replace(chosen, rules=(*chosen.rules, *extra), name="")
    if cached is not None:
        chosen = replace(chosen, kv=cached if cached.stores else None, name="")
    if ignore:
        chosen = replace(chosen, ignore=(*chosen.ignore, *ignore))
    return recipe.with_scheme(chosen)


def read_scheme(text: str) -> Scheme:
    """A preset's name, or a YAML file."""
    if not text.endswith((".yaml", ".yml")):
        return parse_scheme(text)
    with within(text):
        return parse_scheme(read_yaml(text, "scheme"))


def _override(scheme: Scheme, weights: str | None, activations: str | None, anything: bool = False) -> Scheme:
    """The scheme with other weights and inputs; ``anything``: something else is quantized, so none may be left."""
    w = None if weights is None or weights == "none" else Quantizer(weights)
    a = None if activations is None or activations == "none" else Quantizer(activations)
    rules = []
    for rule in scheme.rules:
        if rule.of_attention:
            rules.append(rule)
            continue
        # With --weights alone, activations stay in float: a scheme's activations belong to its own weights.
        inputs = a if activations is not None else None
        rules.append(replace(rule, weights=rule.weights if weights is None else w, inputs=inputs))
    if not any(rule.weights or rule.inputs or rule.outputs or rule.of_attention for rule in rules):
        if not anything and scheme.kv is None:
            raise SchemeError("nothing is left to quantize: weights and activations are both float.")
        rules = []
    return replace(scheme, rules=tuple(rules), name="")
