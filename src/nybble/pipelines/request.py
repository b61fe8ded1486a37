"""From what a person typed to a recipe over a scheme."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

from nybble.core.device import check_device
from nybble.core.errors import SchemeError, UsageError, within
from nybble.core.options import at_least_one
from nybble.data.text import check_text
from nybble.kv_format import KVFormat
from nybble.matmul_format import MatmulFormat
from nybble.pipelines.targets import meant, split_targets
from nybble.quantizer import Quantizer
from nybble.recipe import Recipe, check_names, load_recipe, parse_recipe, read_yaml
from nybble.recipes import BEST, recipe_for, targets
from nybble.scheme import Rule, Scheme, parse_scheme

Asked: TypeAlias = str | Path | Recipe | Scheme | Mapping[str, Any]
"""A recipe by name, its YAML file or mapping, a Recipe; or a Scheme, which is rounded to nearest."""
Line: TypeAlias = str | Quantizer


class Changes(TypedDict, total=False):
    """What :func:`build_recipe` changes."""

    target: str | Sequence[str] | None
    scheme: str | Scheme | Mapping[str, Any] | None
    weights: Line | None
    activations: Line | None
    kv: str | KVFormat | None
    embeddings: Line | None
    matmuls: Line | None
    ignore: Sequence[str]
    effort: str


def read_recipe(asked: Asked) -> Recipe:
    """The recipe that is meant.

    Raises:
        UsageError: unknown name, or something that is no recipe. SchemeError: a malformed one.
    """
    if isinstance(asked, Scheme):
        return load_recipe("rtn").with_scheme(asked)
    if isinstance(asked, Recipe):
        made = asked
    elif isinstance(asked, Mapping):
        made = parse_recipe(asked)
    elif isinstance(asked, str | Path):
        made = load_recipe(str(asked))
    else:
        raise UsageError(
            f"a recipe is a name, a YAML file or mapping, a Recipe, or a Scheme to round to; got a "
            f"{type(asked).__name__}. Data is the next argument."
        )
    check_names(made)
    return made


def build_recipe(
    recipe: Asked,
    *,
    target: str | Sequence[str] | None = None,
    scheme: str | Scheme | Mapping[str, Any] | None = None,
    weights: Line | None = None,
    activations: Line | None = None,
    kv: str | KVFormat | None = None,
    embeddings: Line | None = None,
    matmuls: Line | None = None,
    ignore: Sequence[str] = (),
    effort: str = "full",
) -> Recipe:
    """A recipe with changes to its scheme: those of the command line.

    Args:
        recipe: a name, a YAML file, YAML's mapping, a Recipe, or a Scheme.
        target: what the recipe ``best`` is to come to: ``nvfp4``, ``w4a16`` ...; other lines of as many bits, or in
            that format, go with it. Of an export target it is what that usually gets, unless a scheme is given; keeping
            to what it holds is left to whoever knows the model.
        scheme: in place of the recipe's: a preset's name, a YAML file, YAML's mapping, or a Scheme.
        weights: the quantizer of all its rules' weights; ``none`` is float.
        activations: of all its rules' inputs.
        kv: of the KV cache.
        embeddings: of embeddings and the head tied to them.
        matmuls: of attention's operands.
        ignore: modules to leave alone, beside the scheme's own.
        effort: ``quick`` or ``full``.

    Raises:
        UsageError, SchemeError: unknown names, contradictions, or what no step can do.
    """
    found = meant(recipe, {"target": target, "scheme": scheme, "weights": weights, "activations": activations})
    asked, weights = read_recipe(found.recipe), found.weights or weights
    made = asked.with_effort(effort)
    cached = kv if kv is None or isinstance(kv, KVFormat) else KVFormat.parse(kv)
    if scheme is not None and (weights is not None or activations is not None):
        raise UsageError("--scheme says everything; give either it or --weights and --activations.")
    chosen = made.scheme if scheme is None else read_scheme(scheme)
    if weights is not None or activations is not None:
        chosen = _override(chosen, weights, activations, anything=cached is not None and cached.stores)
    aim, _ = split_targets(target)
    if aim is not None:
        _check_aim(aim, made.scheme, chosen)
    extra = []
    if embeddings is not None:
        extra.append(Rule(targets=("Embedding",), weights=Quantizer(embeddings)))
    if matmuls is not None:
        extra.append(Rule(targets=("Attention",), matmuls=MatmulFormat.parse(str(matmuls))))
    if extra:
        chosen = replace(chosen, rules=(*chosen.rules, *extra), name="")
    if cached is not None:
        chosen = replace(chosen, kv=cached if cached.stores else None, name="")
    if isinstance(ignore, str):
        raise UsageError(f"ignore is a list of modules; got {ignore!r}.")
    if ignore:
        chosen = replace(chosen, ignore=(*chosen.ignore, *ignore))
    _check_quick(asked)
    if scheme is not None or activations is not None:
        made = replace(made, convolutions="")  # what is asked for is had, or refused
    return made.with_scheme(chosen)


def changed_scheme(scheme: Scheme, changes: Mapping[str, Any]) -> Scheme:
    """A training recipe's scheme with what the command line changes: ``scheme``, ``weights``, ``activations``, ``kv``.

    Raises:
        UsageError, SchemeError: as :func:`build_recipe`.
    """
    given: Any = {key: value for key, value in changes.items() if value is not None}
    return build_recipe(scheme, **given).scheme if given else scheme


def _check_quick(recipe: Recipe) -> None:
    """Make the parts of steps that have a quick way, so that its options are known to be right; last, as it is slow."""
    if any(step.quick for step in recipe.steps):
        from nybble.walk.steps.make import check_quick  # torch, which takes seconds

        check_quick(recipe)


def check_prompt(prompt: str, max_new_tokens: int, device: str, kv: str | None) -> KVFormat | None:
    """What ``generate`` is asked for, before anything is loaded; the cache's format, None where no line is given.

    Raises:
        UsageError: an empty prompt, no tokens, no device, a malformed line. DataError: half a surrogate pair.
    """
    if not prompt.strip():
        raise UsageError("the prompt is empty.")
    check_text(prompt, "the prompt")
    at_least_one(max_new_tokens=max_new_tokens)
    check_device(device)
    return None if kv is None else KVFormat.parse(kv)


def read_scheme(text: str | Scheme | Mapping[str, Any]) -> Scheme:
    """A preset's name, a YAML file, YAML's mapping; a Scheme as it is."""
    if isinstance(text, Scheme):
        return text
    if not isinstance(text, str) or not text.endswith((".yaml", ".yml")):
        return parse_scheme(text)
    with within(text):
        return parse_scheme(read_yaml(text, "scheme"))


def _check_aim(aim: str, own: Scheme, chosen: Scheme) -> None:
    """Raise UsageError where nothing of a scheme is what a target's name says: of as many bits, or in its format."""
    wanted, found = _words(aim, own)[0], _words(aim, chosen)
    if wanted in found:
        return
    schemes = {name: load_recipe(recipe_for(BEST, name)).scheme for name in targets()}
    other = next((name for name, its in schemes.items() if _words(name, its)[0] in _words(name, chosen)), None)
    raise UsageError(
        f"target {aim!r} means {wanted}, and --scheme, --weights and --activations come to "
        f"{' and '.join(dict.fromkeys(found))} (beside --weights alone inputs stay in float); "
        f"{f'take --target {other}' if other else 'leave --target out'}, or --recipe {recipe_for(BEST, aim)} for its "
        "steps on whatever these say."
    )


def _words(aim: str, scheme: Scheme) -> list[str]:
    """What each rule of layers comes to, as far as a target says it: ``w4a16`` bits, ``nvfp4`` formats and groups."""

    def word(line: Quantizer | None) -> str:
        if line is None:
            return "float"
        of_bits = re.fullmatch(r"w\d+a\d+", aim.lower())
        return f"{line.format.bits} bits" if of_bits else f"{line.format} {line.granularity}"

    rules = [rule for rule in scheme.rules if not rule.of_attention]
    return [f"weights in {word(rule.weights)} with inputs in {word(rule.inputs)}" for rule in rules]


def _override(scheme: Scheme, weights: Line | None, activations: Line | None, anything: bool = False) -> Scheme:
    """The scheme with other weights and inputs; ``anything``: something else is quantized, so none may be left."""
    w, a = (None if line is None or line == "none" else Quantizer(line) for line in (weights, activations))
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
