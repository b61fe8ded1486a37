"""Quantization without gradients: what :class:`nybble.quantizer.Quantizer` and its parameters calculate.

It stands apart so that a line can be read, and refused, without torch, which takes seconds to load.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from nybble.core.errors import DataError, UsageError
from nybble.ops.blocks import dynamic_round, narrow_scale, scaled_round
from nybble.ops.scaling import guarded
from nybble.packing import get_layout
from nybble.qtensor import Factored, Inverse, QTensor, QuantParams, block_view
from nybble.qtensor.block import BlockQTensor
from nybble.rounding import get_rounding
from nybble.scales import BlockParams, ScaleRule, Storage
from nybble.scales._at_once import dynamic_of, scale_at_once
from nybble.scales.mse import Mse
from nybble.scales.one import One
from nybble.soft import Specification, grid_of, integers, scaled, unscaled


class Rule(Specification, Protocol):
    """What is asked of a Quantizer beside what its gradients ask."""

    @property
    def scale(self) -> ScaleRule: ...  # noqa: D102
    @property
    def static(self) -> bool: ...  # noqa: D102
    @property
    def scale_format(self) -> str | Rule: ...  # noqa: D102
    @property
    def offset_format(self) -> str | Rule: ...  # noqa: D102
    def replace(self, **options: Any) -> Rule: ...  # noqa: D102


# ------------------------------------------------------------------------------------------------ parameters
def fit(spec: Rule, x: Tensor, weight: Tensor | None) -> QuantParams:
    """See :meth:`nybble.quantizer.Quantizer.fit`."""
    wide = _real(x).float()
    if spec.static and spec.scale.takes_divisor and wide.numel():
        two: Any = spec.scale
        return QuantParams(Inverse(two.divisor(wide, spec.format).reshape(1)))
    shape = spec.granularity.scale_shape(wide.shape)
    if not wide.numel():
        return finish(spec, BlockParams(wide.new_ones(math.prod(shape), 1)), shape, None)
    if spec.granularity.factored:
        return factors(spec, wide, None)
    blocks = spec.granularity.to_blocks(wide)
    importance = None if weight is None else spec.granularity.to_blocks(weight.float().expand(wide.shape))
    mask = spec.granularity.mask(wide.shape, wide.device)
    if mask is not None:
        importance = mask.float() if importance is None else importance * mask
    judged = spec.scale.judges_stored
    if judged == "always" or (judged and not isinstance(spec.scale_format, str)):
        return _fit_as_stored(spec, blocks, importance, shape)
    if spec.scale.takes_storage:
        rule: Any = spec.scale
        stored = [_storage(each, shape, blocks.device) for each in (spec.scale_format, spec.offset_format)]
        return finish(spec, rule.fit(blocks, spec.format, spec.rounding, importance, *stored), shape, None)
    found = spec.scale.fit(blocks, spec.format, spec.rounding, importance)
    return finish(spec, found, shape, _outer_of(found.over))


def _storage(inner: str | Rule, shape: tuple[int, ...], device: torch.device) -> Storage:
    """How scales of ``shape`` are stored; as float32 where their own scales are not one number for some of them."""
    if isinstance(inner, str):
        return Storage(inner)
    if isinstance(inner.scale_format, str) and not isinstance(inner.scale, One) and not inner.granularity.factored:
        groups = inner.granularity.to_blocks(torch.arange(math.prod(shape), device=device).view(shape))
        if groups.numel() == math.prod(shape):
            return Storage(inner.scale_format, inner.format, groups)
    return Storage()


def _fit_as_stored(spec: Rule, blocks: Tensor, importance: Tensor | None, shape: tuple[int, ...]) -> QuantParams:
    """:func:`fit` by a rule that judges its candidates as they would be stored.

    Nested ones are stored under an outer scale that the search does not move, but in phases.
    """
    inner = spec.scale_format
    if spec.scale.phases > 1 and not isinstance(inner, str):
        return _fit_by_phases(spec, inner, blocks, importance, shape)
    outer: QuantParams | None = None
    wide: QuantParams | None = None  # the outer scale before its own rounding, where ratios to it are judged

    def project(scale: Tensor, over: Tensor | None) -> Tensor:
        nonlocal outer, wide
        if isinstance(inner, str):
            return narrow_scale(guarded(scale, spec.format), inner)
        if outer is None:
            whole = spec.scale.whole(blocks, spec.format, importance).reshape(shape)
            outer = _outer_of(over) or fit(inner, whole, None)
            if spec.scale.judges_stored == "ratios":
                wide = fit(inner.replace(scale_format="float32"), whole, None)
        return fake_quantize(inner, scale.reshape(shape), wide or outer, None).reshape(-1, 1)

    rule: Any = spec.scale
    found = rule.fit(blocks, spec.format, spec.rounding, importance, project)
    return finish(spec, found, shape, outer)


def _fit_by_phases(
    spec: Rule, inner: Rule, blocks: Tensor, importance: Tensor | None, shape: tuple[int, ...]
) -> QuantParams:
    """:func:`fit` under each outer scale and larger ones up to twice it; of each, that which loses least is kept."""
    rule: Any = spec.scale
    name = "nearest-even" if get_rounding(spec.rounding).stochastic else spec.rounding
    own: Any = fit(inner, rule.whole(blocks, spec.format, importance).reshape(shape), None).scale

    def under(outer: Tensor) -> tuple[Tensor, Tensor]:
        def project(scale: Tensor, over: Tensor | None) -> Tensor:
            return fake_quantize(inner, scale.reshape(shape), QuantParams(outer), None).reshape(-1, 1)

        found = rule.fit(blocks, spec.format, spec.rounding, importance, project)
        scale = project(found.scale, None)
        lost = Mse().error(blocks, found, scale, spec.format, name, importance)
        each = inner.granularity.to_blocks(lost.reshape(shape)).sum(1)
        return inner.granularity.to_blocks(scale.reshape(shape)), each.reshape(own.shape)

    best, (scales, least) = own, under(own)
    for phase in range(1, rule.phases):
        larger = own.float() * 2 ** (phase / rule.phases)
        outer = narrow_scale(larger, str(inner.scale_format)).to(own.dtype)
        tried, lost = under(outer)
        better = lost < least
        best, least = torch.where(better, outer, best), torch.where(better, lost, least)
        scales = torch.where(better.reshape(-1, 1), tried, scales)
    raw = inner.granularity.from_blocks(scales, shape).reshape(-1, 1)
    return finish(spec, BlockParams(raw), shape, QuantParams(best))


def _outer_of(over: Tensor | None) -> QuantParams | None:
    """Parameters of nested scales whose own scale a rule gave as its reciprocal."""
    return None if over is None else QuantParams(Inverse(over.reshape(1)))


def factors(spec: Rule, x: Tensor, fraction: Tensor | None) -> QuantParams:
    """See :meth:`nybble.quantizer.Quantizer.factors`."""
    found = spec.granularity.fit_factors(x, spec.format, fraction)
    return QuantParams(Factored(found, spec.granularity.combine))


def finish(spec: Rule, found: BlockParams, shape: tuple[int, ...], outer: QuantParams | None) -> QuantParams:
    """See :meth:`nybble.quantizer.Quantizer.finish`."""
    scale: Tensor | QTensor | None = None
    raw = found.scale.reshape(shape)
    if not isinstance(spec.scale_format, str):
        scale = quantize(spec.scale_format, raw, _outer(spec.scale_format, found.outer, shape) or outer, None)
    elif not isinstance(spec.scale, One):
        raw = guarded(raw, spec.format)
        scale = narrow_scale(raw, spec.scale_format)
        scale = scale.to(getattr(torch, spec.scale_format))
    zero_point = None if found.zero_point is None else integers(found.zero_point.reshape(shape), spec.format)
    offset: Tensor | QTensor | None = None
    if found.offset is not None:
        value = found.offset.reshape(shape)
        if not isinstance(spec.offset_format, str):
            offset = quantize(spec.offset_format, value, _outer(spec.offset_format, found.offset_outer, shape), None)
        else:
            offset = narrow_scale(value, spec.offset_format).to(getattr(torch, spec.offset_format))
    return QuantParams(scale, zero_point, offset, divisor=raw if spec.raw_scale and scale is not None else None)


def _outer(inner: Rule, outer: Tensor | None, shape: tuple[int, ...]) -> QuantParams | None:
    """Parameters of nested scales whose own scales a rule gave, as they are stored."""
    if outer is None or not isinstance(inner.scale_format, str):
        return None
    return QuantParams(outer.reshape(inner.granularity.scale_shape(shape)).to(getattr(torch, inner.scale_format)))


def measured(spec: Rule, x: Tensor, params: QuantParams | None) -> QuantParams:
    """See :meth:`nybble.quantizer.Quantizer.measured`."""
    if spec.static and spec.scale.takes_divisor:
        return _under(spec, x, fit(spec, x, None) if params is None else params)
    if not spec.center or (params is not None and params.offset is not None):
        return fit(spec, x, None) if params is None else params
    wide = x.float().contiguous()  # the mean adds up in memory order
    mean = wide.mean()
    params = fit(spec, wide - mean, None) if params is None else params
    return replace(params, offset=mean.reshape(1))


def _under(spec: Rule, x: Tensor, params: QuantParams) -> QuantParams:
    """Parameters of ``x``: scales of its blocks, over the calibrated divisor that is all of ``params``."""
    if not isinstance(params.scale, Inverse):
        return params
    two: Any = spec.scale
    found = two.under(spec.granularity.to_blocks(x.float()), spec.format, params.scale.divisor.float().reshape(()))
    return finish(spec, found, spec.granularity.scale_shape(x.shape), _outer_of(found.over))


# ------------------------------------------------------------------------------------------------ use
@torch.no_grad()
def fake_quantize(spec: Rule, x: Tensor, params: QuantParams | None, generator: torch.Generator | None) -> Tensor:
    """See :meth:`nybble.quantizer.Quantizer.fake_quantize`."""
    x = _real(x)
    if not x.numel():
        return x.clone()
    found = None if params is not None else _at_once(spec, spec.granularity.to_blocks(x))
    if found is not None:
        return spec.granularity.from_blocks(found, x.shape)
    shape = tuple(x.shape)
    params = measured(spec, x, params)
    blocks = spec.granularity.to_blocks(x)
    if _elementwise(spec, params) and not isinstance(params.scale, Inverse | None):
        scale = block_view(params.scale, spec.granularity, shape)
        rounded = scaled_round(blocks, scale, spec.format.name, spec.rounding, spec.reciprocal)
        return spec.granularity.from_blocks(rounded, shape)
    y = scaled(spec, blocks.float(), params, shape)
    values = grid_of(spec, params, shape).nearest(y, generator)
    return spec.granularity.from_blocks(unscaled(values, params, spec.granularity, shape), shape).to(x.dtype)


@torch.no_grad()
def quantize(spec: Rule, x: Tensor, params: QuantParams | None, generator: torch.Generator | None) -> BlockQTensor:
    """See :meth:`nybble.quantizer.Quantizer.quantize`."""
    x = _real(x)
    shape = tuple(x.shape)
    params = measured(spec, x, params)
    blocks = spec.granularity.to_blocks(x).float()
    params = _poisoned(spec, params, blocks)
    codes = grid_of(spec, params, shape).encode(scaled(spec, blocks, params, shape), generator)
    flat = spec.granularity.from_blocks(codes, shape).reshape(-1)
    packed = get_layout(spec.packing).pack(flat, spec.format.bits)
    return BlockQTensor(spec.format, spec.granularity, shape, packed, params, spec.packing)


def _real(x: Tensor) -> Tensor:
    """``x`` without its history; refuses what isn't a tensor of real numbers."""
    if not isinstance(x, Tensor):
        raise UsageError(f"what is quantized is a tensor; got a {type(x).__name__}. torch.as_tensor makes one.")
    if x.is_complex():
        raise UsageError(f"numbers of {x.dtype} have no format; torch.view_as_real makes real ones of them.")
    return x.detach()


def _at_once(spec: Rule, blocks: Tensor) -> Tensor | None:
    """Blocks measured and rounded in one operation or two; None where that takes more."""
    dynamic = dynamic_of(spec)
    if dynamic is not None:
        found: Tensor = dynamic_round(blocks, spec.format.name, spec.rounding, *dynamic)
        return found
    scale = scale_at_once(spec, blocks)
    if scale is None:
        return None
    rounded: Tensor = scaled_round(blocks, scale, spec.format.name, spec.rounding)
    return rounded


def _elementwise(spec: Rule, params: QuantParams) -> bool:
    others = params.zero_point, params.offset, params.thresholds, params.divisor, params.grid, params.shift
    plain = all(p is None for p in others)
    return plain and not spec.floor and not get_rounding(spec.rounding).stochastic


def _poisoned(spec: Rule, params: QuantParams, blocks: Tensor) -> QuantParams:
    """A format without NaN carries it in the block's scale; infinity over an infinite scale is NaN too."""
    scale = params.scale
    if spec.format.nan_code is not None or not isinstance(scale, Tensor) or blocks.shape[0] != scale.numel():
        return params
    if spec.center and params.offset is not None:  # one NaN makes the mean NaN
        blocks = blocks - block_view(params.offset, spec.granularity, ())
    bad = blocks.isnan().any(1).reshape(scale.shape) | scale.isinf()
    return replace(params, scale=torch.where(bad, torch.nan, scale))


@cache
def stored_bytes(spec: Rule, shape: tuple[int, ...]) -> float:
    """See :meth:`nybble.quantizer.Quantizer.stored_bytes`."""
    return float(quantize(spec, torch.empty(shape, device="meta"), None, None).nbytes())


def check_finite(x: Tensor, what: str) -> None:
    """Raise DataError when ``x`` holds NaN or Inf; for the edges of pipelines, since it waits for the device."""
    if not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).sum())
        raise DataError(f"{what} holds {bad} NaN or Inf of {x.numel()} values; repair the file or exclude it (ignore).")
