"""Elementwise: a float32 tensor onto a format's grid (values), to its codes, and back.

The reference is one search among the format's thresholds: ``rank(x) = how many thresholds are <= x``. NaN stays NaN
where values come out; as a code it becomes the format's NaN, or, if the format has none, the code of the largest value
(a caller that can meet NaN poisons the scale instead, see :meth:`nybble.quantizer.Quantizer.quantize`). A negative
input that rounds to zero keeps its sign in formats that have -0.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from nybble.core.errors import FormatError
from nybble.core.shapes import Float32, Integer
from nybble.formats import NumberFormat, get_format
from nybble.ops.checks import check_floats
from nybble.rounding import get_rounding


@lru_cache(maxsize=256)
def _tables(name: str, rounding: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Thresholds, grid and grid codes on ``device``."""
    fmt = get_format(name)
    return (
        torch.from_numpy(np.array(fmt.thresholds(rounding))).to(device),
        torch.from_numpy(fmt.grid.astype(np.float32)).to(device),
        torch.from_numpy(fmt.grid_codes.astype(np.int32)).to(device),
    )


@lru_cache(maxsize=256)
def decode_table(name: str, device: torch.device) -> Tensor:
    """float32 [2**bits]: the value of each code of the format, on ``device``."""
    return torch.from_numpy(get_format(name).values.astype(np.float32)).to(device)


def grid_table(name: str, device: torch.device) -> Tensor:
    """float32: the distinct values that an encoder of the format produces, ascending, on ``device``."""
    return _tables(name, "nearest-even", device)[1]


def code_dtype(fmt: NumberFormat) -> torch.dtype:
    """uint8 up to 8 bits, else int32."""
    return torch.uint8 if fmt.bits <= 8 else torch.int32


@torch.library.custom_op("nybble::round_to", mutates_args=(), schema="(Tensor x, str fmt, str rounding) -> Tensor")
def round_to(x: Float32[Tensor, "*shape"], fmt: str, rounding: str) -> Float32[Tensor, "*shape"]:
    """The value of the grid of ``fmt`` nearest to each element, ties by ``rounding``; saturates.

    Args:
        x: float32, any shape.
        fmt: name of the format.
        rounding: name of a deterministic rounding.

    Returns:
        float32, shape of ``x``.
    """
    check_floats("round_to", x)
    thresholds, grid, _ = _tables(fmt, rounding, x.device)
    x = x.contiguous()
    value = grid[torch.bucketize(x, thresholds, right=True)]
    if get_format(fmt).negative_zero is not None:
        value = torch.where(value == 0, torch.copysign(value, x), value)
    return torch.where(x.isnan(), x, value)


@round_to.register_fake
def _(x: Tensor, fmt: str, rounding: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("nybble::encode", mutates_args=(), schema="(Tensor x, str fmt, str rounding) -> Tensor")
def encode(x: Float32[Tensor, "*shape"], fmt: str, rounding: str) -> Integer[Tensor, "*shape"]:
    """Codes of the nearest values: ``decode(encode(x)) == round_to(x)``.

    Args:
        x: float32, any shape.
        fmt: name of the format.
        rounding: name of a deterministic rounding.

    Returns:
        uint8 (int32 above 8 bits), shape of ``x``.
    """
    check_floats("encode", x)
    format_ = get_format(fmt)
    thresholds, _, codes = _tables(fmt, rounding, x.device)
    x = x.contiguous()
    code = codes[torch.bucketize(x, thresholds, right=True)]
    if format_.negative_zero is not None:
        zero = decode_table(fmt, x.device)[code.long()] == 0
        code = torch.where(zero & x.signbit(), format_.negative_zero, code)
    if format_.nan_code is not None:
        code = torch.where(x.isnan(), format_.nan_code, code)
    return code.to(code_dtype(format_))


@encode.register_fake
def _(x: Tensor, fmt: str, rounding: str) -> Tensor:
    return x.new_empty(x.shape, dtype=code_dtype(get_format(fmt)))


@torch.library.custom_op("nybble::decode", mutates_args=(), schema="(Tensor codes, str fmt) -> Tensor")
def decode(codes: Integer[Tensor, "*shape"], fmt: str) -> Float32[Tensor, "*shape"]:
    """The value of each code.

    Args:
        codes: uint8 (int32 above 8 bits), any shape, below ``2**bits``.
        fmt: name of the format.

    Returns:
        float32, shape of ``codes``.
    """
    return decode_table(fmt, codes.device)[codes.contiguous().int()]


@decode.register_fake
def _(codes: Tensor, fmt: str) -> Tensor:
    return codes.new_empty(codes.shape, dtype=torch.float32)


def round_integers(x: Float32[Tensor, "*shape"], rounding: str) -> Float32[Tensor, "*shape"]:
    """Each element to a neighbouring integer, ties by ``rounding``, without bounds (codes around a zero point).

    Args:
        x: float32, any shape.
        rounding: name of a deterministic rounding other than ``native``.

    Returns:
        float32, shape of ``x``.
    """
    rule = get_rounding(rounding)
    if rule.name == "nearest-even":
        return torch.round(x)
    if rule.tie_up is None:
        raise FormatError(f"rounding={rounding} does not round integers around a zero point; use nearest-even.")
    magnitude = x.abs()
    below = magnitude.floor()
    rest = magnitude - below  # exact: both have one sign and the difference is no longer than x
    low = torch.where(x < 0, -below - 1, below)
    tie_up = rule.tie_up(low, low + 1, torch.remainder(low, 2) == 1)
    nearest = torch.where(x < 0, -(below + (rest > 0.5)), below + (rest > 0.5))
    return torch.where(rest == 0.5, low + tie_up, nearest)


def round_to_codes(
    y: Float32[Tensor, "*shape"], zero_point: Float32[Tensor, "*#shape"], low: float, high: float, rounding: str
) -> Float32[Tensor, "*shape"]:
    """``clamp(round(y) + zero_point, low, high)``, or the zero point first where ``rounding`` says so.

    Args:
        y: float32, x / scale.
        zero_point: float32 integers that broadcast against ``y``.
        low: smallest code.
        high: largest code.
        rounding: name of a deterministic rounding other than ``native``.

    Returns:
        float32 integers, shape of ``y``.
    """
    found: Tensor = whole_codes(y, zero_point, low, high, rounding)
    return found


@torch.library.custom_op(
    "nybble::whole_codes",
    mutates_args=(),
    schema="(Tensor y, Tensor zero_point, float low, float high, str rounding) -> Tensor",
)
def whole_codes(y: Tensor, zero_point: Tensor, low: float, high: float, rounding: str) -> Tensor:
    """:func:`round_to_codes`."""
    y = y.contiguous()
    if get_rounding(rounding).zero_inside:
        return torch.round(y + zero_point).clamp(low, high) + 0.0  # no -0 among integers
    return (round_integers(y, rounding) + zero_point).clamp(low, high)


@whole_codes.register_fake
def _(y: Tensor, zero_point: Tensor, low: float, high: float, rounding: str) -> Tensor:
    return y.new_empty(y.shape)


def round_stochastic(
    x: Float32[Tensor, "*shape"], fmt: str, generator: torch.Generator | None
) -> Float32[Tensor, "*shape"]:
    """Round up with probability ``(x - lower) / (upper - lower)``; values of the grid never move; saturates.

    Args:
        x: float32, any shape.
        fmt: name of the format.
        generator: source of the uniform draws, on the device of ``x``; None draws from torch's global generator.

    Returns:
        float32, shape of ``x``; NaN stays NaN.
    """
    return draw_on(x, grid_table(fmt, x.device), generator)


def draw_on(x: Tensor, grid: Tensor, generator: torch.Generator | None) -> Tensor:
    """:func:`round_stochastic` on a grid given by its values, float32 [n], ascending."""
    inside = x.contiguous().clamp(grid[0], grid[-1])  # as tensors: shapes alone, on the meta device, will do
    lower = (torch.bucketize(inside, grid, right=True) - 1).clamp(0, len(grid) - 2)
    low, high = grid[lower], grid[lower + 1]
    draw = torch.rand(x.shape, generator=generator, dtype=torch.float32, device=x.device)
    return torch.where(x.isnan(), x, torch.where(draw < (inside - low) / (high - low), high, low))
