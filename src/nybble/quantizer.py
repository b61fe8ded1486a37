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
scale_format=       float32, float16, bfloat16, or a quantizer line in parentheses (nested scales); or auto: float16
                    for group, block and flat, but where a model's weights are quantized its own dtype, if that has 16
                    bits; bfloat16 for powers of two, else float32                                           (auto)
offset_format=      the same for a rule with an offset     (float16 for group, block and flat, else float32)
reciprocal=true     multiply by 1 / scale instead of dividing by it, as some peers do
raw_scale=true      divide by the scale as it was before its own rounding, as bitsandbytes and GGUF do
floor=              normal | subnormal: the smallest magnitude that is ever stored (scales of NVFP4)
center=mean         store x minus its mean, and the mean (double quantization)
packing=            dense, base3                                                                    (dense)
static              activations: calibrated once instead of measured on every tensor; with scale=two-level the
                    divisor is, and its blocks' scales are measured
==================  =======================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nybble.core.errors import SchemeError
from nybble.core.shapes import Float, Integer
from nybble.formats import NumberFormat
from nybble.granularity import REGISTRY as GRANULARITIES
from nybble.granularity import Granularity
from nybble.line import DEFAULTS, PLAIN, TENSOR, as_written, default_of, is_open, override, parse_words, split_words
from nybble.packing import get_layout
from nybble.rounding import get_rounding
from nybble.scales import BlockParams, ScaleRule
from nybble.scales.one import One

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from nybble.ops.grid import Round
    from nybble.qtensor import QuantParams
    from nybble.qtensor.block import BlockQTensor


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
    follows: bool
    """Whether the line leaves the dtype of its scales to the model (``scale_format=auto``); float16 without one."""

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
                plain = "scale=absmax (recipe rtn)" if self.format.signed else "a signed format"
                raise SchemeError(
                    f"{self.format.name} {self.granularity}: {word} factors are {what} (scale=absmax); {self.scale} "
                    f"has none. Use {plain}, or a scale a block: group, channel or block."
                )
            if self.scale_format != "float32" or self.raw_scale:
                raise SchemeError(f"{self}: {word} factors stay in float32; leave out scale_format and raw_scale.")
        rounding = get_rounding(self.rounding)
        if rounding.native and self.format.encoder_thresholds is None:
            raise SchemeError(
                f"{self.format.name} publishes no encoder thresholds for rounding=native; use nearest-even."
            )
        inner = self.scale_format.granularity if isinstance(self.scale_format, Quantizer) else None
        self.scale.check_scales(self.scale_format.format if isinstance(self.scale_format, Quantizer) else None)
        if self.scale.two_level and (inner is None or not inner.one_scale):
            raise SchemeError(f"scale={self.scale} finds one scale of scales; say scale_format=(float8_e4m3fn tensor).")
        if self.scale.phases > 1 and not _has_plain_scale(self.scale_format):
            raise SchemeError(
                f"scale={self.scale} tries numbers that scales share, and scale_format={self.scale_format} has none "
                "that is a plain one; leave out phases."
            )
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
            said = key == "scale_format" and not self.follows and is_open(self.granularity, self.scale)
            if said or value != default_of(key, self.granularity, self.scale):
                words.append(f"{key}=({value})" if isinstance(value, Quantizer) else f"{key}={str(value).lower()}")
        if self.static:
            words.append("static")
        return " ".join(words)

    def __repr__(self) -> str:
        return f"Quantizer({str(self)!r})"

    def stored_bytes(self, shape: tuple[int, ...]) -> float:
        """Bytes that a tensor of ``shape`` takes in a file: codes, scales and offsets with theirs, padding, tables."""
        from nybble.hard import stored_bytes

        return stored_bytes(self, shape)

    def replace(self, **options: Any) -> Quantizer:
        """A copy with some words changed: ``q.replace(group=64)``."""
        return Quantizer(str(self), **options)

    def fitted(self, shape: tuple[int, ...]) -> Quantizer:
        """The same, spelled as plainly as a tensor of ``shape`` allows: without padding where no group is short.

        >>> q = Quantizer("int4 group=64 pad=true")
        >>> [str(q.fitted((8, columns))) for columns in (128, 147, 27)]
        ['int4 group=64', 'int4 group=64 pad=true', 'int4 group=27']
        """
        plain = self.granularity.fitted(shape)
        if plain == self.granularity:
            return self
        return self.replace(**{key: value for key, _, value in (word.partition("=") for word in str(plain).split())})

    def of_model(self, dtype: torch.dtype) -> Quantizer:
        """As it is for the weights of a model in ``dtype``, whose 16 bits its scales have where the line says nothing.

        Others multiply in the dtype in which scales are stored, so these are the ones that they load unchanged.
        """
        name = str(dtype).removeprefix("torch.")
        return self.replace(scale_format=name) if self.follows and name in ("bfloat16", "float16") else self

    # ------------------------------------------------------------------------------------------------ parameters
    def fit(self, x: Float[Tensor, "*shape"], weight: Float[Tensor, "*#shape"] | None = None) -> QuantParams:
        """Find scales (and zero points or offsets) for ``x``.

        Args:
            x: float32, float16 or bfloat16, any shape that the granularity can cut.
            weight: importance of the elements (>= 0), broadcastable to ``x``; only searching rules and means use it.
        """
        from nybble.hard import fit

        return fit(self, x, weight)

    def factors(self, x: Tensor, fraction: Tensor | None = None) -> QuantParams:
        """Parameters under a factored granularity.

        Args:
            x: float32, not empty, or the granularity's summary of it.
            fraction: float32 [1], of the unclipped range, where the granularity can be searched.
        """
        from nybble.hard import factors

        return factors(self, x, fraction)

    def finish(self, found: BlockParams, shape: tuple[int, ...], outer: QuantParams | None = None) -> QuantParams:
        """Bring raw parameters [blocks, 1] into their stored form: zero guard, narrowing, nested quantization.

        Args:
            found: from a scale rule or a search.
            shape: the granularity's scale shape.
            outer: parameters of nested scales that are already fixed.
        """
        from nybble.hard import finish

        return finish(self, found, shape, outer)

    # ------------------------------------------------------------------------------------------------ use
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
        from nybble.hard import fake_quantize

        return fake_quantize(self, x, params, generator)

    def quantize(
        self, x: Float[Tensor, "*shape"], params: QuantParams | None = None, generator: torch.Generator | None = None
    ) -> BlockQTensor:
        """Round ``x`` to codes and scales.

        Arguments as :meth:`fake_quantize`. NaN: a format with a NaN code keeps it; elsewhere the block's scale becomes
        NaN.

        Returns:
            a BlockQTensor of the shape of ``x``; ``dequantize()`` gives exactly :meth:`fake_quantize`.
        """
        from nybble.hard import quantize

        return quantize(self, x, params, generator)

    def measured(self, x: Tensor, params: QuantParams | None) -> QuantParams:
        """``params``, or those of ``x`` for None; with center=mean and no offset given, its mean too."""
        from nybble.hard import measured

        return measured(self, x, params)

    # ------------------------------------------------------------------------------------------------ training
    def soft(
        self,
        x: Float[Tensor, "*shape"],
        params: QuantParams | None = None,
        round: Round | None = None,
        *,
        dtype: torch.dtype | None = None,
        share: float = 1.0,
    ) -> Float[Tensor, "*shape"]:
        """Fake quantization with gradients, for any format, granularity, nesting and offset.

        Args:
            x: float32, float16 or bfloat16.
            params: raw (:meth:`soften`) or stored; tensors of it that want a gradient get one. Raw ones are used as
                they would be stored, with the gradient passed straight through to them. None measures them on ``x``.
            round: ``(y, grid) -> values``, see :data:`nybble.ops.grid.Round`: learned or noisy rounding. None rounds
                as :meth:`fake_quantize` does, straight through with clipping (:func:`nybble.ops.grid.nearest`).
            dtype: what the result is cast to; None: that of ``x``.
            share: of the gradient that reaches the scale.

        Returns:
            shape and dtype of ``x``; without ``round`` it is ``fake_quantize(x, harden(params))`` bit for bit.
        """
        from nybble.soft import soft

        return soft(self, x, params, round, dtype, share)

    def settle(
        self, x: Float[Tensor, "*shape"], params: QuantParams | None, round: Round | None = None
    ) -> BlockQTensor:
        """Store what :meth:`soft` calculates: ``settle(x, p, r).dequantize(x.dtype)`` equals ``soft(x, p, r)``.

        Raises:
            DataError: ``round`` returns values off the grid (it must have settled); or ``x`` holds NaN.
        """
        from nybble.soft import harden, settle

        if round is None:
            return self.quantize(x, None if params is None else harden(self, params))
        return settle(self, x, params, round)

    def soften(self, params: QuantParams) -> QuantParams:
        """Stored parameters as raw ones: float32 copies, which training may replace by leaves of its own.

        A scale (or offset) that is quantized itself becomes its values, and its own parameters go to ``scale_params``
        (``offset_params``), raw too: they stay fixed unless they are trained as well. With raw_scale=true the raw scale
        is the divisor, where it is known.
        """
        from nybble.soft import soften

        return soften(self, params)

    def harden(self, params: QuantParams) -> QuantParams:
        """Raw parameters as stored ones, without gradient: ``harden(soften(p))`` stores the same bytes as ``p``.

        Plain tensors are taken as raw, QTensors as stored: scales and offsets are narrowed or quantized as
        ``scale_format`` and ``offset_format`` say, zero points rounded and held within the codes. Factors of a factored
        scale are kept as they are.
        """
        from nybble.soft import harden

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
        from nybble.soft import codes_of

        return codes_of(self, values, params)

    def pack(self, codes: Integer[Tensor, "*shape"], params: QuantParams) -> BlockQTensor:
        """Pack codes that need not be the nearest ones.

        Args:
            codes: integers of the shape of the tensor: bit patterns, 0 .. 2**bits - 1.
            params: raw or stored.

        Raises:
            DataError: codes out of range, or that the packing can't hold; parameters of another shape.
        """
        from nybble.soft import pack

        return pack(self, codes, params)


def _has_plain_scale(nested: str | Quantizer) -> bool:
    """Whether scales are stored over numbers of their own that are one plain tensor."""
    if isinstance(nested, str) or isinstance(nested.scale, One):
        return False
    return isinstance(nested.scale_format, str) and not nested.granularity.factored


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
