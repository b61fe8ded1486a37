"""A scheme as MLX can hold its result: the same formats and groups, told in its parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from nybble.core.errors import GranularityError, SchemeError
from nybble.export import Facts
from nybble.export._mlx_form import form_of
from nybble.line import PLAIN
from nybble.models.sources.layouts._ct_args import E2M1, E4M3, CannotError
from nybble.quantizer import Quantizer
from nybble.scales.minmax import MinMax
from nybble.scheme import Rule, Scheme

_MOST = 128  # rows of a trial


def constrained(scheme: Scheme, facts: Facts) -> Scheme:
    """See :meth:`nybble.export.ExportTarget.constrain`."""
    experts = tuple(name for name, target in facts.targets.items() if target.kind.fused)
    chosen = scheme.match(facts.classes).rules
    rules: list[Rule] = []
    for rule in scheme.rules:
        if rule.inputs is not None or rule.outputs is not None or rule.matmuls is not None:
            names = next((name for name, found in chosen.items() if found is rule), ", ".join(rule.targets))
            way_out = "leave --matmuls out" if rule.matmuls is not None else "pass --activations none"
            raise SchemeError(f"{names}: MLX's files keep no quantizer of activations; {way_out}.")
        if rule.weights is None:
            rules.append(rule)
            continue
        own = tuple(name for name in experts if chosen.get(name) is rule)
        layers = _weights(rule.weights, facts.dtype, experts=False)
        of_experts = _weights(rule.weights, facts.dtype, experts=True)
        if own and layers != of_experts:
            rules.append(replace(rule, targets=own, weights=of_experts))
        if layers == of_experts or any(found is rule for name, found in chosen.items() if name not in own):
            rules.append(replace(rule, weights=layers))
    made = replace(scheme, rules=tuple(rules))
    for name, rule in made.match(facts.classes).rules.items():
        if rule.weights is not None:
            _check(rule.weights, name, facts)
    return made


def _weights(quantizer: Quantizer, dtype: torch.dtype, experts: bool) -> Quantizer:
    """The quantizer with scales and offsets as MLX keeps them.

    Args:
        quantizer: of weights.
        dtype: of the model, which scales and biases have; of float32 the upper half of the digits is used.
        experts: whether NVFP4's scales may have a scale, as MLX's experts alone have one.
    """
    changed: dict[str, Any] = {"packing": "dense"} if quantizer.packing != "dense" else {}
    inner = quantizer.scale_format
    if isinstance(inner, Quantizer):
        if inner.format.name == E4M3 and quantizer.format.name == E2M1:
            changed |= _nvfp4(quantizer, inner, experts)
        return quantizer.replace(**changed) if changed else quantizer
    if not quantizer.format.is_integer or inner not in PLAIN:
        return quantizer.replace(**changed) if changed else quantizer
    exact = str(dtype).removeprefix("torch.")
    if exact == "float32":
        exact = inner if inner != "float32" else "float16"
    if isinstance(quantizer.scale, MinMax):  # what MLX's own quantizer does: a zero point that is a real number
        name = quantizer.format.name.removesuffix("_full")
        changed |= {"scale": "minmax(offset=true)"} | ({} if name.startswith("u") else {"": f"u{name}"})
    if quantizer.scale.has_offset or "scale" in changed:
        changed["offset_format"] = exact
    if inner != exact:
        changed["scale_format"] = exact
    return _replaced(quantizer, changed)


def _replaced(quantizer: Quantizer, changed: dict[str, Any]) -> Quantizer:
    """With some words changed; the empty one is the format."""
    from nybble.line import split_words

    name = changed.pop("", None)
    if name is None:
        return quantizer.replace(**changed) if changed else quantizer
    words = {key: value for key, value in split_words(str(quantizer)).items() if key not in ("", "symmetric")}
    line = " ".join([name, *(f"{key}={value}" if value else key for key, value in words.items())])
    return Quantizer(line, **changed)


def _nvfp4(quantizer: Quantizer, inner: Quantizer, experts: bool) -> dict[str, Any]:
    """No scale over the scales, or of experts a power of two, which MLX's division gives exactly."""
    if experts:
        two_level = quantizer.scale.two_level or "inner=" in str(quantizer.scale)
        return {} if two_level else {"scale_format": inner.replace(scale="pow2(mode=rceil)")}
    found: dict[str, Any] = {"scale_format": Quantizer(f"{E4M3} scale=one")}
    return found | ({"scale": "absmax"} if quantizer.scale.two_level else {})


def _check(quantizer: Quantizer, name: str, facts: Facts) -> None:
    target = facts.targets[name]
    rows, columns = target.shape
    try:
        if name in facts.without_place:
            raise facts.without_place[name]
        form_of(quantizer.quantize(torch.ones(min(rows, _MOST), columns)), target.kind.fused)
    except GranularityError as error:
        raise SchemeError(f"{name}: {error}") from error
    except CannotError as error:
        raise SchemeError(f"{name}: MLX can't hold {error}.") from error
