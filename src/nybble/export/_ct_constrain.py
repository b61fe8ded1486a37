"""A scheme as compressed-tensors can hold its result: the same formats, told in its parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from nybble.core.errors import SchemeError, within
from nybble.export import Facts
from nybble.export._fused import SIBLINGS, check_siblings
from nybble.line import PLAIN
from nybble.models.sources.layouts._ct_args import E2M1, E4M3, CannotError, activation_args, kv_args, weight_args
from nybble.quantizer import Quantizer
from nybble.scales.absmax import AbsMax
from nybble.scales.pow2 import Pow2
from nybble.scheme import Rule, Scheme

MOST_ROWS = 128  # of a trial


def constrained(scheme: Scheme, facts: Facts) -> Scheme:
    """See :meth:`nybble.export.ExportTarget.constrain`."""
    made = replace(scheme, rules=tuple(_rule(rule, facts) for rule in scheme.rules), together=SIBLINGS)
    found = made.match(facts.classes).rules
    for name, rule in found.items():
        target = facts.targets[name]
        try:
            if rule.weights is not None and name in facts.without_place:
                raise facts.without_place[name]
            with within(name):
                _check(rule, target.shape)
        except CannotError as error:
            raise SchemeError(f"{name}: compressed-tensors can't hold {error}.") from error
    check_siblings(found, facts.targets)
    if scheme.kv is not None and scheme.kv.stores:
        try:
            kv_args(scheme.kv, 1)
        except CannotError as error:
            raise SchemeError(f"compressed-tensors can't hold a {error}.") from error
    return made


def _rule(rule: Rule, facts: Facts) -> Rule:
    weights = rule.weights
    if weights is not None:
        weights = _weights(weights, facts.dtype, alone=rule.inputs is None)
    return replace(rule, weights=weights, inputs=_activations(rule.inputs), outputs=_activations(rule.outputs))


def _activations(quantizer: Quantizer | None) -> Quantizer | None:
    """As the library, and vLLM, find scales at every token: powers of two; NVFP4's under a calibrated divisor."""
    if quantizer is None:
        return None
    if not isinstance(quantizer.scale, Pow2):
        return under_divisor(quantizer)
    mode = "rceil" if quantizer.format.name == E4M3 else "even"  # compressed-tensors' threshold, 1.75, of both
    return quantizer.replace(scale=f"pow2(mode={mode})")


def under_divisor(quantizer: Quantizer) -> Quantizer:
    """Of NVFP4 inputs those that runtimes round: in groups under a calibrated divisor; others as they are."""
    inner = quantizer.scale_format
    nested = isinstance(inner, Quantizer) and inner.format.name == E4M3 and inner.granularity.one_scale
    grouped = quantizer.format.name == E2M1 and str(quantizer.granularity) == "group=16"
    return Quantizer("nvfp4-ct static") if nested and grouped else quantizer


def _weights(quantizer: Quantizer, dtype: torch.dtype, alone: bool) -> Quantizer:
    """The quantizer with its scales as the format keeps them.

    Args:
        quantizer: of weights.
        dtype: of the model; runtimes cast the scales of integers to it.
        alone: whether inputs stay in float.
    """
    inner = quantizer.scale_format
    changed: dict[str, Any] = {"packing": "dense"} if quantizer.packing != "dense" else {}
    if isinstance(inner, Quantizer) and inner.format.name == E4M3 and quantizer.format.name == E2M1:
        if not quantizer.scale.two_level and "inner=" not in str(quantizer.scale) and isinstance(inner.scale, AbsMax):
            # A power of two has an exact reciprocal, which files keep; and siblings' can be brought to one exactly.
            changed["scale_format"] = inner.replace(scale="pow2(mode=rceil)")
    elif inner in PLAIN and quantizer.format.is_integer and alone and not quantizer.granularity.factored:
        wanted = str(dtype).removeprefix("torch.")
        if inner != wanted and wanted != "float32":
            changed["scale_format"] = wanted
    return quantizer.replace(**changed) if changed else quantizer


def _check(rule: Rule, shape: tuple[int, int]) -> None:
    if rule.weights is not None:
        rows, columns = shape
        weight_args(rule.weights.quantize(torch.ones(min(rows, MOST_ROWS), columns)))
    for quantizer in (rule.inputs, rule.outputs):
        if quantizer is not None:
            activation_args(quantizer)
    if rule.matmuls is not None:
        raise CannotError("operands of attention", "--matmuls left out")
    if rule.kv is not None:
        raise CannotError(f"KV cache {rule.kv}", "one cache for all layers (--kv)")
