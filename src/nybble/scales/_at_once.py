"""Scales that one operation measures and rounds as they would be stored: of the largest magnitude of each block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nybble.formats.minifloat import Minifloat
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
    stored = _over_one(inner)
    return None if stored is None else (rule.target or spec.format.absmax, *stored)


def stored_at_once(inner: Any, raw: Tensor) -> Tensor | None:
    """Scales as they are stored by a quantizer of their own that measures them; None where that takes more.

    Args:
        inner: the quantizer.
        raw: float32, not empty, any shape.
    """
    import torch

    from nybble.ops.measured import nested_scale

    stored = _over_one(inner)
    if stored is None or inner.static:
        return None
    found = nested_scale(raw.reshape(-1, 1), 1.0, *stored).view(raw.shape)
    return torch.where(raw < 0, -found, found) if stored[2] else torch.copysign(found, raw)


def _over_one(inner: Any) -> tuple[str, float, float] | None:
    """Format, target and least value of scales that are stored over one float32 for all; on a grid with both signs."""
    fmt, over = inner.format, inner.scale
    known = isinstance(fmt, Minifloat) and fmt.has_sign and fmt.has_zero and fmt.nan_code is not None
    one = isinstance(over, AbsMax) and inner.granularity.one_scale and not inner.granularity.factored
    plain = inner.rounding == "nearest-even" and not (inner.reciprocal or inner.raw_scale or inner.center)
    if not (known and one and plain) or inner.scale_format != "float32":
        return None
    assert isinstance(fmt, Minifloat) and isinstance(over, AbsMax)
    least = {"": 0.0, "normal": fmt.min_normal, "subnormal": fmt.smallest}[inner.floor]
    return fmt.name, over.target or fmt.absmax, least


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
