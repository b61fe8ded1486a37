"""Scales that one operation measures and rounds as they would be stored: of the largest magnitude of each block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nybble.rounding import get_rounding
from nybble.scales.absmax import AbsMax
from nybble.scales.pow2 import Pow2

if TYPE_CHECKING:
    from torch import Tensor


def dynamic_of(spec: Any) -> tuple[float, str, str] | None:
    """Target, mode and dtype of the scales for :func:`nybble.ops.blocks.dynamic_round`; None where it can't.

    Args:
        spec: a quantizer.
    """
    rule, stored = spec.scale, spec.scale_format
    if not _plain(spec):
        return None
    if isinstance(rule, Pow2) and rule.of_maximum:
        exact = str(stored) == "float8_e8m0fnu scale=one"
        return (1.0, rule.mode, "float32" if exact else stored) if exact or isinstance(stored, str) else None
    if isinstance(rule, AbsMax) and isinstance(stored, str):
        return rule.target or spec.format.absmax, "", stored
    return None


def nested_of(spec: Any) -> tuple[float, str, float, float] | None:
    """Target, format of the scales, its target and least value for :func:`nybble.ops.measured.nested_scale`, or None.

    Args:
        spec: a quantizer.
    """
    rule, inner = spec.scale, spec.scale_format
    if isinstance(inner, str) or not isinstance(rule, AbsMax) or not _plain(spec):
        return None
    fmt, over = inner.format, inner.scale
    known = fmt.has_zero and fmt.nan_code is not None and inner.rounding == "nearest-even"
    one = isinstance(over, AbsMax) and inner.granularity.one_scale and not inner.granularity.factored
    if not known or not one or inner.scale_format != "float32" or inner.reciprocal or inner.raw_scale or inner.center:
        return None
    least = {"": 0.0, "normal": fmt.min_normal, "subnormal": fmt.smallest}[inner.floor]
    return rule.target or spec.format.absmax, fmt.name, over.target or fmt.absmax, least


def scale_at_once(spec: Any, blocks: Tensor) -> Tensor | None:
    """float32 [blocks, 1]: what blocks are divided by, measured on them; None where that takes more than one step.

    Args:
        spec: a quantizer.
        blocks: float32, float16 or bfloat16, [blocks, elements], not empty.
    """
    from nybble.ops.measured import dynamic_scale, nested_scale

    dynamic, nested = dynamic_of(spec), nested_of(spec)
    found: Tensor | None = None
    if dynamic is not None:
        found = dynamic_scale(blocks, spec.format.name, *dynamic)
    elif nested is not None:
        found = nested_scale(blocks, *nested)
    return found


def _plain(spec: Any) -> bool:
    """Whether elements are divided by the scale that is stored, and rounded, and that is all."""
    more = spec.reciprocal or spec.raw_scale or spec.floor or spec.center or get_rounding(spec.rounding).stochastic
    return not more and not spec.granularity.factored
