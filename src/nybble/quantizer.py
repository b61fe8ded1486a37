"""Quantizer: the whole specification of how a tensor becomes few bits, in one line.

    float4_e2m1fn group=32 scale=mse
    int4 group=64 symmetric=false
    nvfp4                                       (a preset: see nybble.presets)
    nf4 flat=64 scale_format=(dynamic8 flat=256 center=mean)

==================  =======================================================================================
word                meaning (default)
==================  =======================================================================================
granularity         tensor | channel | token | plane | group=N [pad=true] | block=RxC | flat=N | rank1 |
                    shifted[=N] (tensor)
scale=              a scale rule and its options: absmax, mse(grid=80), percentile(p=99.9), pow2 ... (absmax)
symmetric=false     integers: the range min..max with an integer zero point
rounding=           nearest-even, half-away, half-up, half-down, toward-zero, native, stochastic ... (nearest-even)
scale_format=       float32, float16, bfloat16, or a quantizer line in parentheses (nested scales)
                    (float16 for group, block and flat, bfloat16 for powers of two, else float32)
offset_format=      the same for a rule with an offset     (float16 for group, block and flat, else float32)
reciprocal=true     multiply by 1 / scale instead of dividing by it, as some peers do
raw_scale=true      divide by the scale as it was before its own rounding, as bitsandbytes and GGUF do
floor=              normal | subnormal: the smallest magnitude that is ever stored (scales of NVFP4)
center=mean         store x minus its mean, and the mean (double quantization)
packing=            dense, base3                                                                    (dense)
static              activations: calibrated once instead of measured on every tensor
==================  =======================================================================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nybble.core.errors import DataError, SchemeError
from nybble.core.shapes import Float, Integer
from nybble.formats import NumberFormat
from nybble.granularity import REGISTRY as GRANULARITIES
from nybble.granularity import Granularity
from nybble.line import DEFAULTS, PLAIN, TENSOR, as_written, default_of, override, parse_words, split_words
from nybble.ops.blocks import dynamic_round, narrow_scale, scaled_round
from nybble.ops.grid import Round
from nybble.ops.scaling import divided, guarded
from nybble.packing import get_layout
from nybble.qtensor import Factored, Inverse, QTensor, QuantParams, block_view
from nybble.qtensor.block import BlockQTensor
from nybble.rounding import get_rounding
from nybble.scales import BlockParams, ScaleRule
from nybble.scales.absmax import AbsMax
from nybble.scales.mse import Mse
from nybble.scales.one import One
from nybble.scales.pow2 import Pow2
from nybble.soft import codes_of, grid_of, harden, integers, pack, scaled, settle, soft, soften, unscaled


@dataclass(frozen=True, init=False)
class Quantizer:
    """format x granularity x scale rule x rounding: what to do, without any tensor's parameters.

    Hashable; ``Quantizer(str(q)) == q``. Tensors that it makes are float32 inside, saturate, and divide by the scale.

    Args:
        line: the specification (module docstring).
        options: further words as keyword arguments, overriding the line: ``Quantizer("int4", group=64, scale="mse")``.

    Raises:
        UsageError: an unknown word, preset, format or option, with the closest one.

    >>> str(Quantizer("e2m1", group=32)), str(Quantizer("int4 symmetric=false scale=minmax"))
    ('float4_e2m1fn group=32', 'int4 symmetric=false')
    """

    format: NumberFormat
    granularity: Granularity
    scale: ScaleRule
    rounding: str
    scale_format: str | Quantizer
    offset_format: str | Quantizer
    reciprocal: bool
    raw_scale: bool
    floor: str
    center: str
    packing: str
    static: bool

    def __init__(self, line: str | Quantizer, /, **options: Any) -> None:
        words = split_words(str(line))
        override(words, {key: _text(key, value) for key, value in options.items()})
        fields = parse_words(words, str(line))
        for name in ("scale_format", "offset_format"):
            fields[name] = _nested(fields[name])
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        if self.scale.needs_integer and not self.format.is_integer:
            raise SchemeError(
                f"an integer zero point needs an integer format, not {self.format.name}; use scale=minmax(offset=true)."
            )
        if self.granularity.factored:
            self.granularity.check_format(self.format)
            word, what = self.granularity.word, self.granularity.factors_are
            if str(self.scale) != "absmax":
                raise SchemeError(f"{word} factors are {what} (scale=absmax); {self.scale} has none.")
            if self.scale_format != "float32" or self.raw_scale:
                raise SchemeError(f"{self}: {word} factors stay in float32; leave out scale_format and raw_scale.")
        rounding = get_rounding(self.rounding)
        if rounding.native and self.format.encoder_thresholds is None:
            raise SchemeError(
                f"{self.format.name} publishes no encoder thresholds for rounding=native; use nearest-even."
            )
        inner = self.scale_format.granularity if isinstance(self.scale_format, Quantizer) else None
        if self.scale.two_level and (inner is None or not inner.one_scale):
            raise SchemeError(f"scale={self.scale} finds one scale of scales; say scale_format=(float8_e4m3fn tensor).")
        layout = get_layout(self.packing)
        layout.size(1, self.format.bits)
        if layout.holds is not None and not layout.holds.issuperset(self.format.produced):
            raise SchemeError(f"packing={layout.name} can't hold all codes of {self.format.name}; use packing=dense.")

    def __str__(self) -> str:
        name, scale = as_written(self.format, self.scale)
        words = [name]
        if self.granularity != TENSOR:
            words.append(str(self.granularity))
        words += scale
        for key in DEFAULTS:
            value = getattr(self, key)
            if value != default_of(key, self.granularity, self.scale):
                words.append(f"{key}=({value})" if isinstance(value, Quantizer) else f"{key}={str(value).lower()}")
        if self.static:
            words.append("static")
        return " ".join(words)

    def __repr__(self) -> str:
        return f"Quantizer({str(self)!r})"

    def stored_bytes(self, shape: tuple[int, ...]) -> float:
        """Bytes that a tensor of ``shape`` takes in a file: codes, scales and offsets with theirs, padding, tables."""
        return _stored_bytes(self, shape)

    def replace(self, **options: Any) -> Quantizer:
        """A copy with some words changed: ``q.replace(group=64)``."""
        return Quantizer(str(self), **options)

    # ------------------------------------------------------------------------------------------------ parameters
    def fit(self, x: Float[Tensor, "*shape"], weight: Float[Tensor, "*#shape"] | None = None) -> QuantParams:
        """Find scales (and zero points or offsets) for ``x``.

        Args:
            x: float32, float16 or bfloat16, any shape that the granularity can cut.
            weight: importance of the elements (>= 0), broadcastable to ``x``; only searching rules and means use it.
        """
        wide = x.detach().float()
        shape = self.granularity.scale_shape(wide.shape)
        if not wide.numel():
            return self.finish(BlockParams(wide.new_ones(math.prod(shape), 1)), shape)
        if self.granularity.factored:
            return self.factors(wide)
        blocks = self.granularity.to_blocks(wide)
        importance = None if weight is None else self.granularity.to_blocks(weight.float().expand(wide.shape))
        mask = self.granularity.mask(wide.shape, wide.device)
        if mask is not None:
            importance = mask.float() if importance is None else importance * mask
        if isinstance(self.scale, Mse) and isinstance(self.scale_format, Quantizer):
            # Candidates are judged as they would be stored, under an outer scale that the search does not move.
            inner = self.scale_format
            outer = inner.fit(divided(blocks.abs().amax(1), self.format.absmax).reshape(shape))

            def project(scale: Tensor) -> Tensor:
                return inner.fake_quantize(scale.reshape(shape), outer).reshape(-1, 1)

            return self.finish(self.scale.fit(blocks, self.format, self.rounding, importance, project), shape, outer)
        found = self.scale.fit(blocks, self.format, self.rounding, importance)
        return self.finish(found, shape, None if found.over is None else QuantParams(Inverse(found.over.reshape(1))))

    def factors(self, x: Tensor, fraction: Tensor | None = None) -> QuantParams:
        """Parameters under a factored granularity.

        Args:
            x: float32, not empty, or the granularity's summary of it.
            fraction: float32 [1], of the unclipped range, where the granularity can be searched.
        """
        found = self.granularity.fit_factors(x, self.format, fraction)
        return QuantParams(Factored(found, self.granularity.combine))

    def finish(self, found: BlockParams, shape: tuple[int, ...], outer: QuantParams | None = None) -> QuantParams:
        """Bring raw parameters [blocks, 1] into their stored form: zero guard, narrowing, nested quantization.

        Args:
            found: from a scale rule or a search.
            shape: the granularity's scale shape.
            outer: parameters of nested scales that are already fixed.
        """
        scale: Tensor | QTensor | None = None
        raw = found.scale.reshape(shape)
        if isinstance(self.scale_format, Quantizer):
            scale = self.scale_format.quantize(raw, outer)
        elif not isinstance(self.scale, One):
            raw = guarded(raw, self.format)
            scale = narrow_scale(raw, self.scale_format)
            scale = scale.to(getattr(torch, self.scale_format))
        zero_point = None if found.zero_point is None else integers(found.zero_point.reshape(shape), self.format)
        offset: Tensor | QTensor | None = None
        if found.offset is not None:
            value = found.offset.reshape(shape)
            if isinstance(self.offset_format, Quantizer):
                offset = self.offset_format.quantize(value)
            else:
                offset = narrow_scale(value, self.offset_format).to(getattr(torch, self.offset_format))
        return QuantParams(scale, zero_point, offset, divisor=raw if self.raw_scale and scale is not None else None)

    # ------------------------------------------------------------------------------------------------ use
    @torch.no_grad()
    def fake_quantize(
        self, x: Float[Tensor, "*shape"], params: QuantParams | None = None, generator: torch.Generator | None = None
    ) -> Float[Tensor, "*shape"]:
        """Round ``x`` to what :meth:`quantize` would store, without storing it; no gradient.

        Args:
            x: float32, float16 or bfloat16.
            params: from :meth:`fit`, used as they are (of raw ones give :meth:`harden`'s); None measures them on ``x``.
            generator: for stochastic rounding only.

        Returns:
            shape and dtype of ``x``; equal to ``quantize(x, params).dequantize(x.dtype)`` bit for bit where ``x`` is
            finite.
        """
        x = x.detach()
        if not x.numel():
            return x.clone()
        if params is None and self._fused:
            target = self.scale.target or self.format.absmax if isinstance(self.scale, AbsMax) else 1.0
            mode = self.scale.mode if isinstance(self.scale, Pow2) else ""
            narrow = self.scale_format if isinstance(self.scale_format, str) else "float32"
            blocks = self.granularity.to_blocks(x)
            rounded = dynamic_round(blocks, self.format.name, self.rounding, target, mode, narrow)
            return self.granularity.from_blocks(rounded, x.shape)
        shape = tuple(x.shape)
        params = self.measured(x, params)
        blocks = self.granularity.to_blocks(x)
        if self._elementwise(params) and not isinstance(params.scale, Inverse | None):
            scale = block_view(params.scale, self.granularity, shape)
            rounded = scaled_round(blocks, scale, self.format.name, self.rounding, self.reciprocal)
            return self.granularity.from_blocks(rounded, shape)
        y = scaled(self, blocks.float(), params, shape)
        values = grid_of(self, params, shape).nearest(y, generator)
        return self.granularity.from_blocks(unscaled(values, params, self.granularity, shape), shape).to(x.dtype)

    @torch.no_grad()
    def quantize(
        self, x: Float[Tensor, "*shape"], params: QuantParams | None = None, generator: torch.Generator | None = None
    ) -> BlockQTensor:
        """Round ``x`` to codes and scales.

        Arguments as :meth:`fake_quantize`. NaN: a format with a NaN code keeps it; elsewhere the block's scale becomes
        NaN.

        Returns:
            a BlockQTensor of the shape of ``x``; ``dequantize()`` gives exactly :meth:`fake_quantize`.
        """
        x = x.detach()
        shape = tuple(x.shape)
        params = self.measured(x, params)
        blocks = self.granularity.to_blocks(x).float()
        params = self._poisoned(params, blocks)
        codes = grid_of(self, params, shape).encode(scaled(self, blocks, params, shape), generator)
        flat = self.granularity.from_blocks(codes, shape).reshape(-1)
        packed = get_layout(self.packing).pack(flat, self.format.bits)
        return BlockQTensor(self.format, self.granularity, shape, packed, params, self.packing)

    # ------------------------------------------------------------------------------------------------ parts
    @property
    def _fused(self) -> bool:
        nested = isinstance(self.scale_format, Quantizer)
        exact = isinstance(self.scale, Pow2) and str(self.scale_format) == "float8_e8m0fnu scale=one"
        return (
            isinstance(self.scale, AbsMax | Pow2)
            and (not isinstance(self.scale, Pow2) or self.scale.of_maximum)
            and (not nested or exact)
            and not self.granularity.factored
            and not (
                self.reciprocal or self.raw_scale or self.floor or self.center or get_rounding(self.rounding).stochastic
            )
        )

    def _elementwise(self, params: QuantParams) -> bool:
        plain = all(
            p is None for p in (params.zero_point, params.offset, params.thresholds, params.divisor, params.grid)
        )
        return plain and not self.floor and not get_rounding(self.rounding).stochastic

    def measured(self, x: Tensor, params: QuantParams | None) -> QuantParams:
        """``params``, or those of ``x`` for None; with center=mean and no offset given, its mean too."""
        if not self.center or (params is not None and params.offset is not None):
            return self.fit(x) if params is None else params
        wide = x.float().contiguous()  # the mean adds up in memory order
        mean = wide.mean()
        params = self.fit(wide - mean) if params is None else params
        return replace(params, offset=mean.reshape(1))

    def _poisoned(self, params: QuantParams, blocks: Tensor) -> QuantParams:
        """A format without NaN carries it in the block's scale; infinity over an infinite scale is NaN too."""
        scale = params.scale
        if self.format.nan_code is not None or not isinstance(scale, Tensor) or blocks.shape[0] != scale.numel():
            return params
        if self.center and params.offset is not None:  # one NaN makes the mean NaN
            blocks = blocks - block_view(params.offset, self.granularity, ())
        bad = blocks.isnan().any(1).reshape(scale.shape) | scale.isinf()
        return replace(params, scale=torch.where(bad, torch.nan, scale))

    # ------------------------------------------------------------------------------------------------ training
    def soft(
        self, x: Float[Tensor, "*shape"], params: QuantParams | None = None, round: Round | None = None
    ) -> Float[Tensor, "*shape"]:
        """Fake quantization with gradients, for any format, granularity, nesting and offset.

        Args:
            x: float32, float16 or bfloat16.
            params: raw (:meth:`soften`) or stored; tensors of it that want a gradient get one. Raw ones are used as
                they would be stored, with the gradient passed straight through to them. None measures them on ``x``.
            round: ``(y, grid) -> values``, see :data:`nybble.ops.grid.Round`: learned or noisy rounding. None rounds
                as :meth:`fake_quantize` does, straight through with clipping (:func:`nybble.ops.grid.nearest`).

        Returns:
            shape and dtype of ``x``; without ``round`` it is ``fake_quantize(x, harden(params))`` bit for bit.
        """
        return soft(self, x, params, round)

    def settle(
        self, x: Float[Tensor, "*shape"], params: QuantParams | None, round: Round | None = None
    ) -> BlockQTensor:
        """Store what :meth:`soft` calculates: ``settle(x, p, r).dequantize(x.dtype)`` equals ``soft(x, p, r)``.

        Raises:
            DataError: ``round`` returns values off the grid (it must have settled); or ``x`` holds NaN.
        """
        if round is None:
            return self.quantize(x, None if params is None else harden(self, params))
        return settle(self, x, params, round)

    def soften(self, params: QuantParams) -> QuantParams:
        """Stored parameters as raw ones: float32 copies, which training may replace by leaves of its own.

        A scale (or offset) that is quantized itself becomes its values, and its own parameters go to ``scale_params``
        (``offset_params``), raw too: they stay fixed unless they are trained as well. With raw_scale=true the raw scale
        is the divisor, where it is known.
        """
        return soften(self, params)

    def harden(self, params: QuantParams) -> QuantParams:
        """Raw parameters as stored ones, without gradient: ``harden(soften(p))`` stores the same bytes as ``p``.

        Plain tensors are taken as raw, QTensors as stored: scales and offsets are narrowed or quantized as
        ``scale_format`` and ``offset_format`` say, zero points rounded and held within the codes. Factors of a factored
        scale are kept as they are.
        """
        return harden(self, params)

    def codes_of(self, values: Float[Tensor, "*shape"], params: QuantParams) -> Integer[Tensor, "*shape"]:
        """The codes of values of the grid, exactly: -0, zero points and learned grids too.

        Args:
            values: shape of the tensor, in the units of ``x / scale`` with the zero point taken off.
            params: raw or stored.

        Returns:
            uint8 (int32 above 8 bits), shape of ``values``.

        Raises:
            DataError: a value is not on the grid.
        """
        return codes_of(self, values, params)

    def pack(self, codes: Integer[Tensor, "*shape"], params: QuantParams) -> BlockQTensor:
        """Pack codes that need not be the nearest ones.

        Args:
            codes: integers of the shape of the tensor: bit patterns, 0 .. 2**bits - 1.
            params: raw or stored.

        Raises:
            DataError: codes out of range, or that the packing can't hold; parameters of another shape.
        """
        return pack(self, codes, params)


def _text(key: str, value: Any) -> str:
    """An option as a line has it; of a granularity without a size, and of ``static``, the word alone says yes."""
    if isinstance(value, bool):
        return "" if value and (key in GRANULARITIES or key == "static") else str(value).lower()
    return f"({value})" if isinstance(value, Quantizer) else str(value)


def _nested(text: str) -> str | Quantizer:
    """A plain dtype's name, or the quantizer of a line in parentheses."""
    if text in PLAIN:
        return text
    return Quantizer(text[1:-1] if text.startswith("(") and text.endswith(")") else text)


def check_finite(x: Tensor, what: str) -> None:
    """Raise DataError when ``x`` holds NaN or Inf; for the edges of pipelines, since it waits for the device."""
    if not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).sum())
        raise DataError(f"{what} holds {bad} NaN or Inf of {x.numel()} values; repair the file or exclude it (ignore).")


@cache
def _stored_bytes(quantizer: Quantizer, shape: tuple[int, ...]) -> float:
    return float(quantizer.quantize(torch.empty(shape, device="meta")).nbytes())
