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
scale_format=       float32, float16, bfloat16, or a quantizer line in parentheses (nested scales)  (float32)
offset_format=      the same for a rule with an offset                                             (float32)
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
from typing import Any

import torch
from torch import Tensor

from nybble.core.errors import DataError, SchemeError
from nybble.formats import NumberFormat
from nybble.granularity import REGISTRY as GRANULARITIES
from nybble.granularity import Granularity
from nybble.line import DEFAULTS, PLAIN, TENSOR, override, parse_words, split_words
from nybble.ops.blocks import divide, dynamic_round, narrow_scale, scaled_round
from nybble.ops.rounding import encode, round_stochastic, round_to, round_to_codes
from nybble.ops.scaling import divided
from nybble.packing import get_layout
from nybble.qtensor import Factored, Inverse, QTensor, QuantParams, block_view, scale_blocks
from nybble.qtensor.block import BlockQTensor
from nybble.rounding import get_rounding
from nybble.scales import BlockParams, ScaleRule
from nybble.scales.absmax import AbsMax
from nybble.scales.mse import Mse
from nybble.scales.one import One
from nybble.scales.pow2 import Pow2


@dataclass(frozen=True, init=False)
class Quantizer:
    """format x granularity x scale rule x rounding: what to do, without any tensor's parameters.

    Hashable; ``Quantizer(str(q)) == q``. Tensors that it makes are float32 inside, saturate, and divide by the scale.

    Args:
        line: the specification (module docstring).
        options: further words as keyword arguments, overriding the line: ``Quantizer("int4", group=64, scale="mse")``.

    Raises:
        UsageError: an unknown word, preset, format or option, with the closest one.

    >>> str(Quantizer("e2m1", group=32))
    'float4_e2m1fn group=32'
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
        words = [self.format.name]
        if self.granularity != TENSOR:
            words.append(str(self.granularity))
        if str(self.scale) != "absmax":
            words.append(f"scale={self.scale}")
        for key, default in DEFAULTS.items():
            value = getattr(self, key)
            if value != default:
                words.append(f"{key}=({value})" if isinstance(value, Quantizer) else f"{key}={str(value).lower()}")
        if self.static:
            words.append("static")
        return " ".join(words)

    def __repr__(self) -> str:
        return f"Quantizer({str(self)!r})"

    def replace(self, **options: Any) -> Quantizer:
        """A copy with some words changed: ``q.replace(group=64)``."""
        return Quantizer(str(self), **options)

    # ------------------------------------------------------------------------------------------------ parameters
    def fit(self, x: Tensor, weight: Tensor | None = None) -> QuantParams:
        """Find scales (and zero points or offsets) for ``x``.

        Args:
            x: float32, float16 or bfloat16, any shape that the granularity can cut.
            weight: importance of the elements (>= 0), broadcastable to ``x``; only searching rules and means use it.
        """
        wide = x.detach().float()
        shape = self.granularity.scale_shape(wide.shape)
        if not wide.numel():
            return self.finish(BlockParams(wide.new_ones(math.prod(shape))), shape)
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
            raw = torch.where(raw == 0, torch.ones_like(raw), raw)
            scale = narrow_scale(raw, self.scale_format)
            scale = scale.to(getattr(torch, self.scale_format))
        zero_point = None if found.zero_point is None else _integers(found.zero_point.reshape(shape), self.format)
        offset: Tensor | QTensor | None = None
        if found.offset is not None:
            value = found.offset.reshape(shape)
            if isinstance(self.offset_format, Quantizer):
                offset = self.offset_format.quantize(value)
            else:
                offset = narrow_scale(value, self.offset_format).to(getattr(torch, self.offset_format))
        return QuantParams(scale, zero_point, offset, divisor=raw if self.raw_scale and scale is not None else None)

    # ------------------------------------------------------------------------------------------------ use
    def fake_quantize(
        self, x: Tensor, params: QuantParams | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Round ``x`` to what :meth:`quantize` would store, without storing it; no gradient.

        Args:
            x: float32, float16 or bfloat16.
            params: from :meth:`fit`; None measures them on ``x``.
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
        centre, x_in = self._centred(x)
        params = self.fit(x_in) if params is None else params
        params = self._with_offset(params, centre)
        blocks = self.granularity.to_blocks(x_in)
        if self._elementwise(params) and not isinstance(params.scale, Inverse | None):
            scale = block_view(params.scale, self.granularity, shape)
            rounded = scaled_round(blocks, scale, self.format.name, self.rounding, self.reciprocal)
            return self.granularity.from_blocks(rounded, shape)
        values, _ = self._round(blocks.float(), params, shape, generator, codes=False)
        return self.granularity.from_blocks(_affine(values, params, self.granularity, shape), shape).to(x.dtype)

    def quantize(
        self, x: Tensor, params: QuantParams | None = None, generator: torch.Generator | None = None
    ) -> BlockQTensor:
        """Round ``x`` to codes and scales.

        Arguments as :meth:`fake_quantize`. NaN: a format with a NaN code keeps it; elsewhere the block's scale becomes
        NaN.

        Returns:
            a BlockQTensor of the shape of ``x``; ``dequantize()`` gives exactly :meth:`fake_quantize`.
        """
        x = x.detach()
        shape = tuple(x.shape)
        centre, x_in = self._centred(x)
        params = self.fit(x_in) if params is None else params
        blocks = self.granularity.to_blocks(x_in).float()
        params = self._poisoned(self._with_offset(params, centre), blocks)
        _, codes = self._round(blocks, params, shape, generator, codes=True)
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
            and (not nested or exact)
            and not self.granularity.factored
            and not (
                self.reciprocal or self.raw_scale or self.floor or self.center or get_rounding(self.rounding).stochastic
            )
        )

    def _elementwise(self, params: QuantParams) -> bool:
        plain = all(p is None for p in (params.zero_point, params.offset, params.thresholds, params.divisor))
        return plain and not self.floor and not get_rounding(self.rounding).stochastic

    def _centred(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        if not self.center:
            return None, x
        wide = x.float().contiguous()  # the mean adds up in memory order
        mean = wide.mean()
        return mean, wide - mean

    def _with_offset(self, params: QuantParams, centre: Tensor | None) -> QuantParams:
        if centre is None:
            return params
        return replace(params, offset=centre.reshape(1))

    def _poisoned(self, params: QuantParams, blocks: Tensor) -> QuantParams:
        """A format without NaN carries it in the block's scale; infinity over an infinite scale is NaN too."""
        scale = params.scale
        if self.format.nan_code is not None or not isinstance(scale, Tensor) or blocks.shape[0] != scale.numel():
            return params
        bad = blocks.isnan().any(1).reshape(scale.shape) | scale.isinf()
        return replace(params, scale=torch.where(bad, torch.nan, scale))

    def _round(
        self,
        blocks: Tensor,
        params: QuantParams,
        shape: tuple[int, ...],
        generator: torch.Generator | None,
        *,
        codes: bool,
    ) -> tuple[Tensor, Tensor]:
        """Values (before scale and offset) or codes of blocks, float32 or integers [blocks, elements]."""
        y = blocks
        if params.offset is not None and not self.center:
            y = y - block_view(params.offset, self.granularity, shape)
        if params.scale is not None:
            by = block_view(params.scale if params.divisor is None else params.divisor, self.granularity, shape)
            y = y * by if isinstance(params.scale, Inverse) else divide(y, by, self.reciprocal)
        name, stochastic = self.format.name, get_rounding(self.rounding).stochastic
        if params.thresholds is not None:
            rank = torch.bucketize(y.contiguous(), params.thresholds, right=True)
            y = torch.from_numpy(self.format.grid).float().to(y.device)[rank]
        elif params.zero_point is not None:
            zero = block_view(params.zero_point, self.granularity, shape)
            if stochastic:
                below = torch.floor(y)
                up = torch.rand(y.shape, generator=generator, device=y.device) < y - below
                y = (below + up + zero).clamp(self.format.min, self.format.max)
            else:
                y = round_to_codes(y, zero, self.format.min, self.format.max, self.rounding)
        elif stochastic:
            y = round_stochastic(y, name, generator)
        if self.floor:
            least = self.format.min_normal if self.floor == "normal" else self.format.smallest
            y = torch.where(y.isnan(), y, torch.where(y < 0, y.clamp(max=-least), y.clamp(min=least)))
        settled = stochastic or params.thresholds is not None or params.zero_point is not None
        rounding = "nearest-even" if settled else self.rounding
        if codes:
            return y, encode(y.contiguous(), name, rounding)
        return (y if settled and not self.floor else round_to(y, name, rounding)), y


def _affine(values: Tensor, params: QuantParams, granularity: Granularity, shape: tuple[int, ...]) -> Tensor:
    """``scale * (value - zero_point) + offset`` on blocks, as BlockQTensor.dequantize does it."""
    if params.zero_point is not None:
        values = values - block_view(params.zero_point, granularity, shape)
    if params.scale is not None:
        values = scale_blocks(values, params.scale, granularity, shape)
    if params.offset is not None:
        values = values + block_view(params.offset, granularity, shape)
    return values


def _integers(zero_point: Tensor, fmt: NumberFormat) -> BlockQTensor:
    """Zero points as codes of the same integer format, densely packed."""
    codes = encode(zero_point.contiguous(), fmt.name, "nearest-even").reshape(-1)
    packed = get_layout("dense").pack(codes, fmt.bits)
    return BlockQTensor(fmt, TENSOR, tuple(zero_point.shape), packed, QuantParams(None))


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
