"""Quantization with gradients: what :meth:`nybble.quantizer.Quantizer.soft` and its neighbours calculate.

    y = (x - shift - offset) / scale        values = round(y, grid)        x_hat = scale * values + offset

in float32, as :meth:`~nybble.quantizer.Quantizer.fake_quantize` does it, step by step, so that the two agree in every
bit. ``round`` may be learned; the rest is ordinary autograd.

Parameters in training are *raw*: a QuantParams whose scale, zero point and offset are plain float32 tensors that a
gradient can move freely. Their *stored* form (narrowed to 16 bits, quantized by a quantizer of their own, whole
numbers) is what the forward uses, with the gradient passed straight through: :func:`harden` gives it, :func:`soften` is
the way back.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from nybble.core.errors import DataError, FileError, SchemeError
from nybble.formats import NumberFormat
from nybble.granularity import Granularity, make_granularity
from nybble.ops.blocks import divide, narrow_scale
from nybble.ops.grid import Grid, Round, nearest, straight_through
from nybble.ops.reaching import Reaching
from nybble.ops.rounding import decode, encode
from nybble.ops.straight import How, round_straight
from nybble.packing import get_layout
from nybble.qtensor import (
    Factored,
    Inverse,
    QTensor,
    QuantParams,
    ScaleLike,
    block_view,
    dense,
    from_spec,
    scale_blocks,
)
from nybble.qtensor.block import BlockQTensor
from nybble.rounding import get_rounding
from nybble.scales._at_once import scale_at_once, stored_at_once


class Specification(Protocol):
    """What is asked of a :class:`nybble.quantizer.Quantizer`, a row above: fields and methods as there."""

    @property
    def format(self) -> NumberFormat: ...  # noqa: D102
    @property
    def granularity(self) -> Granularity: ...  # noqa: D102
    @property
    def rounding(self) -> str: ...  # noqa: D102
    @property
    def scale_format(self) -> str | Specification: ...  # noqa: D102
    @property
    def offset_format(self) -> str | Specification: ...  # noqa: D102
    @property
    def reciprocal(self) -> bool: ...  # noqa: D102
    @property
    def raw_scale(self) -> bool: ...  # noqa: D102
    @property
    def floor(self) -> str: ...  # noqa: D102
    @property
    def center(self) -> str: ...  # noqa: D102
    @property
    def packing(self) -> str: ...  # noqa: D102

    def measured(self, x: Tensor, params: QuantParams | None) -> QuantParams: ...  # noqa: D102

    def quantize(self, x: Tensor, params: QuantParams | None = None) -> BlockQTensor: ...  # noqa: D102


# ---------------------------------------------------------------------------------------------------- x to y and back
def scaled(spec: Specification, blocks: Tensor, params: QuantParams, shape: tuple[int, ...]) -> Tensor:
    """``(x - shift - offset) / scale``: float32 [blocks, elements]."""
    y = blocks
    if params.shift is not None:
        y = y - spec.granularity.to_blocks(params.shift.expand(shape))
    if params.offset is not None:
        y = y - block_view(params.offset, spec.granularity, shape)
    if params.scale is None:
        return y
    by = block_view(params.scale if params.divisor is None else params.divisor, spec.granularity, shape)
    return y * by if isinstance(params.scale, Inverse) else divide(y, by, spec.reciprocal)


def unscaled(values: Tensor, params: QuantParams, granularity: Granularity, shape: tuple[int, ...]) -> Tensor:
    """``scale * value + offset``: the inverse of :func:`scaled`, as BlockQTensor.dequantize does it."""
    if params.scale is not None:
        values = scale_blocks(values, params.scale, granularity, shape)
    if params.offset is not None:
        values = values + block_view(params.offset, granularity, shape)
    return values


def grid_of(spec: Specification, params: QuantParams, shape: tuple[int, ...]) -> Grid:
    """The values that the elements may take under these parameters."""
    zero = None if params.zero_point is None else block_view(params.zero_point, spec.granularity, shape)
    return Grid(spec.format, spec.rounding, spec.floor, zero, params.grid, params.thresholds)


def soft(
    spec: Specification,
    x: Tensor,
    params: QuantParams | None,
    round: Round | None,
    dtype: torch.dtype | None = None,
    share: float = 1.0,
) -> Tensor:
    """See :meth:`nybble.quantizer.Quantizer.soft`."""
    if not x.numel():
        return x.clone().to(dtype or x.dtype)
    shape = tuple(x.shape)
    at_once = (round is None or isinstance(round, Reaching)) and _plain(spec)
    how = How(spec.format.name, spec.rounding, round is not None, share, dtype)
    shift = round.shift if isinstance(round, Reaching) else None
    if at_once and params is None:
        blocks = spec.granularity.to_blocks(x)
        scale = scale_at_once(spec, blocks.detach())
        if scale is not None:
            return spec.granularity.from_blocks(round_straight(blocks, scale, None, shift, how), shape)
    params = through(spec, spec.measured(x, params))
    if at_once and isinstance(params.scale, Tensor) and _alone(params, round):
        blocks, scale = spec.granularity.to_blocks(x), block_view(params.scale, spec.granularity, shape)
        if len(scale) == len(blocks):
            zero = None if params.zero_point is None else block_view(params.zero_point, spec.granularity, shape)
            return spec.granularity.from_blocks(round_straight(blocks, scale, zero, shift, how), shape)
    if share != 1 and isinstance(params.scale, Tensor):
        still = params.scale.detach()
        params = replace(params, scale=still + (params.scale - still) * share)  # its value, exactly
    return _step_by_step(spec, x, params, round).to(dtype or x.dtype)


def _step_by_step(spec: Specification, x: Tensor, params: QuantParams, round: Round | None) -> Tensor:
    """:func:`soft` under parameters that :func:`through` gave, of all that is more than scales and zero points."""
    shape = tuple(x.shape)
    wide = spec.granularity.to_blocks(x).float()
    y = scaled(spec, wide, params, shape)
    values = (round or nearest)(y, grid_of(spec, params, shape))
    if values.shape != y.shape:
        raise DataError(
            f"a rounding returns the shape that it gets, {list(y.shape)}; this one made {list(values.shape)}."
        )
    blocks = unscaled(values, params, spec.granularity, shape)
    if not spec.format.has_zero and params.scale is not None:
        # A scale of 0 would multiply every gradient by 0, and a block of zeros could never leave it.
        empty = block_view(params.scale, spec.granularity, shape) == 0
        blocks = torch.where(empty, straight_through(blocks, wide), blocks)
    return spec.granularity.from_blocks(blocks, shape).to(x.dtype)


def _plain(spec: Specification) -> bool:
    """Whether elements are divided by a scale a block, and rounded, and that is all."""
    more = spec.floor or spec.reciprocal or spec.granularity.factored or get_rounding(spec.rounding).stochastic
    return not more and spec.format.has_zero


def _alone(params: QuantParams, round: Round | None) -> bool:
    """Whether there is nothing but scales and whole zero points that no gradient reaches."""
    zero = params.zero_point
    moved = round is None and isinstance(zero, Tensor) and zero.requires_grad
    others = params.offset, params.thresholds, params.divisor, params.grid, params.shift
    return not moved and all(value is None for value in others)


# --------------------------------------------------------------------------------------------------- codes by decision
@torch.no_grad()
def settle(spec: Specification, x: Tensor, params: QuantParams | None, round: Round) -> BlockQTensor:
    """See :meth:`nybble.quantizer.Quantizer.settle`."""
    x, shape = x.detach(), tuple(x.shape)
    params = harden(spec, spec.measured(x, params))
    grid = grid_of(spec, params, shape)
    values = round(scaled(spec, spec.granularity.to_blocks(x).float(), params, shape), grid)
    codes = grid.codes(values, spec.granularity.mask(shape, x.device))
    return pack(spec, spec.granularity.from_blocks(codes, shape), params)


@torch.no_grad()
def codes_of(spec: Specification, values: Tensor, params: QuantParams) -> Tensor:
    """See :meth:`nybble.quantizer.Quantizer.codes_of`."""
    shape = tuple(values.shape)
    grid = grid_of(spec, harden(spec, params), shape)
    codes = grid.codes(spec.granularity.to_blocks(values).float(), spec.granularity.mask(shape, values.device))
    return spec.granularity.from_blocks(codes, shape)


@torch.no_grad()
def pack(spec: Specification, codes: Tensor, params: QuantParams) -> BlockQTensor:
    """See :meth:`nybble.quantizer.Quantizer.pack`."""
    fmt, layout = spec.format, get_layout(spec.packing)
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise DataError(f"codes are integers; got {codes.dtype} (Quantizer.codes_of makes them of values).")
    if codes.numel():
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= 2**fmt.bits:
            raise DataError(
                f"codes of {fmt.name} are bit patterns from 0 to {2**fmt.bits - 1}, not signed values; "
                f"got {low} to {high}."
            )
        if layout.holds is not None:
            strange = set(codes.flatten().tolist()) - set(layout.holds)
            if strange:
                raise DataError(f"packing={layout.name} can't hold code {min(strange)} of {fmt.name}.")
    flat = codes.reshape(-1).to(torch.uint8 if fmt.bits <= 8 else torch.int32)
    shape, stored = tuple(codes.shape), harden(spec, params)
    made = BlockQTensor(fmt, spec.granularity, shape, layout.pack(flat, fmt.bits), stored, spec.packing)
    try:
        from_spec(made.spec(), made.tensors())
    except FileError as error:
        raise DataError(f"parameters that don't fit the codes: {error}") from error
    return made


# -------------------------------------------------------------------------------------------------- raw and stored
def harden(spec: Specification, params: QuantParams) -> QuantParams:
    """See :meth:`nybble.quantizer.Quantizer.harden`."""
    scale, divisor = params.scale, params.divisor
    if isinstance(scale, Factored):
        scale = Factored(tuple(_detached(f) for f in scale.factors), scale.combine)
    elif isinstance(scale, Inverse):
        scale = Inverse(scale.divisor.detach())
    elif isinstance(scale, Tensor):
        raw = scale.detach().float()
        divisor = raw if spec.raw_scale and divisor is None else divisor
        scale = _stored(raw, spec.scale_format, params.scale_params)
    zero = params.zero_point
    if isinstance(zero, Tensor) and zero.is_floating_point():
        zero = integers(zero.detach().float(), spec.format)
    offset = params.offset
    if isinstance(offset, Tensor):
        raw = offset.detach().float()
        offset = raw if spec.center else _stored(raw, spec.offset_format, params.offset_params)
    found = QuantParams(scale, zero, offset, _detach(params.thresholds), _detach(divisor), _detach(params.grid))
    return found if params.shift is None else replace(found, shift=params.shift.detach().clone())


def through(spec: Specification, params: QuantParams) -> QuantParams:
    """The stored values, all dense, with the gradient of the raw ones; outer scales get theirs from the nested soft."""
    scale, divisor = params.scale, params.divisor
    if isinstance(scale, Factored):
        scale = Factored(tuple(dense(f) for f in scale.factors), scale.combine)
    elif isinstance(scale, Tensor):
        divisor = scale.float() if spec.raw_scale and divisor is None else divisor
        scale = _through(scale.float(), spec.scale_format, params.scale_params)
    zero = params.zero_point
    if isinstance(zero, Tensor) and zero.is_floating_point():
        whole = torch.round(zero.detach().float()).clamp(spec.format.min, spec.format.max) + 0.0
        zero = straight_through(whole, zero.float())
    offset = params.offset
    if isinstance(offset, Tensor):
        raw = offset.float()
        offset = raw if spec.center else _through(raw, spec.offset_format, params.offset_params)
    return replace(params, scale=scale, zero_point=zero, offset=offset, divisor=divisor)


def soften(spec: Specification, params: QuantParams) -> QuantParams:
    """See :meth:`nybble.quantizer.Quantizer.soften`."""
    scale: ScaleLike | None = params.scale
    offset, zero = params.offset, params.zero_point
    scale_params, offset_params = params.scale_params, params.offset_params
    if isinstance(scale, Factored):
        scale = Factored(tuple(f if isinstance(f, QTensor) else _raw(f) for f in scale.factors), scale.combine)
    elif isinstance(scale, Inverse):
        scale = Inverse(_raw(scale.divisor))
    elif isinstance(scale, QTensor):
        scale, scale_params = _softened("scale", scale, spec.scale_format, params.divisor)
    elif scale is not None:
        scale = _raw(scale)
    if isinstance(offset, QTensor):
        offset, offset_params = _softened("offset", offset, spec.offset_format, None)
    elif offset is not None:
        offset = _raw(offset)
    return QuantParams(
        scale,
        None if zero is None else _raw(dense(zero)),
        offset,
        None if params.thresholds is None else _raw(params.thresholds),
        grid=None if params.grid is None else _raw(params.grid),
        scale_params=scale_params,
        offset_params=offset_params,
        shift=None if params.shift is None else _raw(params.shift),
    )


def _stored(raw: Tensor, how: str | Specification, params: QuantParams | None) -> Tensor | QTensor:
    if isinstance(how, str):
        return narrow_scale(raw, how).to(getattr(torch, how))
    return how.quantize(raw, None if params is None else harden(how, params))


def _through(raw: Tensor, how: str | Specification, params: QuantParams | None) -> Tensor:
    if not isinstance(how, str):
        stored = None if params is not None else stored_at_once(how, raw.detach())
        return straight_through(soft(how, raw.detach(), params, None) if stored is None else stored, raw)
    return raw if how == "float32" else straight_through(narrow_scale(raw.detach(), how), raw)


def _softened(
    name: str, stored: QTensor, how: str | Specification, divisor: Tensor | None
) -> tuple[Tensor, QuantParams]:
    """Raw values that are stored as exactly these codes, under the outer parameters that these have."""
    if isinstance(how, str) or not isinstance(stored, BlockQTensor):
        raise SchemeError(f"{name} is stored as {stored.kind} where the quantizer keeps it as {how}; fit it anew.")
    params = soften(how, stored.params)
    raw = _raw(dense(stored) if divisor is None else divisor).reshape(stored.shape)
    outer, want = harden(how, params), stored.unpacked()
    for _ in range(_AROUND_A_MEAN if how.center else _ELSEWHERE):  # all of them: to ask would wait for the device
        got = how.quantize(raw, outer).unpacked()
        apart = decode(want, how.format.name) - decode(got, how.format.name)
        there = torch.nextafter(raw, torch.copysign(torch.full_like(raw, torch.inf), apart))
        raw = torch.where(got == want, raw, there)
    return raw, params


_AROUND_A_MEAN = 16  # steps of float32, one of which can be as wide as the cells of several codes
_ELSEWHERE = 1  # a product that was rounded, divided again, is less than that apart


def integers(zero_point: Tensor, fmt: NumberFormat) -> BlockQTensor:
    """Zero points, rounded and held in range, as codes of the same integer format, densely packed."""
    codes = encode(zero_point.contiguous(), fmt.name, "nearest-even").reshape(-1)
    packed = get_layout("dense").pack(codes, fmt.bits)
    return BlockQTensor(fmt, make_granularity("tensor"), tuple(zero_point.shape), packed, QuantParams(None))


def _raw(value: Tensor) -> Tensor:
    """A float32 copy of its own, so that an optimizer's step in place changes nothing stored."""
    return value.detach().float().clone()


def _detach(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach()


def _detached(value: Tensor | QTensor) -> Tensor | QTensor:
    return value.detach() if isinstance(value, Tensor) else value
