"""Activations rounded on a CPU by the compiled library; what it has no version of goes the readable way."""

from __future__ import annotations

import ctypes
import math
from functools import lru_cache

import torch
from torch import Tensor

from nybble.formats import NumberFormat
from nybble.formats.integer import IntFormat
from nybble.formats.minifloat import Minifloat
from nybble.kernels._library import library, team
from nybble.kernels._rounders import adder
from nybble.kernels._weights import DTYPES
from nybble.nn.compiled import quantizer_of
from nybble.nn.input_rounding import reference, rounded_inputs
from nybble.ops.scaling import pow2_carry
from nybble.quantizer import Quantizer
from nybble.scales.absmax import AbsMax
from nybble.scales.pow2 import Pow2

_ISA = 3
_NARROW = {"float32": 0, "bfloat16": 1, "float16": 2}
_ROW, _ALL = "token", "tensor"


class _Grid(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_float) for name in ("least", "most", "factor", "largest"))


class _Rounding(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("columns", "integer", "pow2", "narrow", "nested")),
        ("grid", _Grid), ("inner", _Grid),
        *((name, ctypes.c_float) for name in ("low", "high", "target", "inner_target", "inner_floor")),
        ("carry", ctypes.c_int32), ("emax", ctypes.c_int32),
    )  # fmt: skip


def rounded(x: Tensor, line: str) -> Tensor:
    """See :func:`nybble.nn.input_rounding.reference`."""
    found = library()
    how = _rounding(line, x.shape[-1]) if found is not None and x.numel() and x.dtype in DTYPES else None
    if how is None or found is None:
        return reference(x, line)
    x = x.contiguous()
    out = torch.empty_like(x)
    failed = found.nybble_round(
        ctypes.addressof(how),
        x.data_ptr(),
        DTYPES[x.dtype],
        x.numel() // how.columns,
        out.data_ptr(),
        torch.get_num_threads(),
        _ISA,
        team(),
    )
    if failed == 1:
        raise MemoryError(f"no memory to round activations {list(x.shape)}.")
    return reference(x, line) if failed else out


@lru_cache(maxsize=4096)
def _rounding(line: str, columns: int) -> _Rounding | None:
    """The library's record of a quantizer for rows of so many columns; None where it has no version of it."""
    quantizer = quantizer_of(line)
    block = _block(quantizer, columns)
    told = quantizer.reciprocal or quantizer.raw_scale or quantizer.floor or quantizer.center or quantizer.static
    if block is None or told or quantizer.rounding != "nearest-even" or not quantizer.format.has_zero:
        return None
    made = _Rounding(columns=block)
    fits = _set_grid(made, quantizer.format) and _set_scale(made, quantizer)
    return made if fits else None


def _block(quantizer: Quantizer, columns: int) -> int | None:
    """Columns that share a scale."""
    granularity = str(quantizer.granularity)
    if granularity == _ROW:
        return columns
    word, _, size = granularity.partition("=")
    return int(size) if word == "group" and size.isdigit() and columns % int(size) == 0 else None


def _set_grid(made: _Rounding, fmt: NumberFormat) -> bool:
    if isinstance(fmt, IntFormat):
        made.integer, made.low, made.high = True, fmt.min, fmt.max
        return fmt.bits <= 16
    made.grid = _grid(fmt)
    return bool(made.grid.factor)


def _grid(fmt: NumberFormat) -> _Grid:
    """Of a float's values; zeros where the adder doesn't round to them."""
    if not isinstance(fmt, Minifloat) or adder(fmt.name, "nearest-even") is None:
        return _Grid()
    return _Grid(least=2.0**fmt.emin, most=2.0**fmt.emax, factor=1.5 * 2.0 ** (23 - fmt.m), largest=fmt.max)


def _set_scale(made: _Rounding, quantizer: Quantizer) -> bool:
    rule, stored, fmt = quantizer.scale, quantizer.scale_format, quantizer.format
    if isinstance(rule, Pow2) and rule.of_maximum:
        exact = str(stored) == "float8_e8m0fnu scale=one"
        made.pow2, made.narrow, made.emax = (
            True,
            0 if exact else _NARROW.get(str(stored), 0),
            math.frexp(fmt.absmax)[1] - 1,
        )
        made.carry, made.target = pow2_carry(fmt, rule.mode), 1.0
        return (exact or str(stored) in _NARROW) and made.emax >= 1
    if not isinstance(rule, AbsMax):
        return False
    made.target = rule.target or fmt.absmax
    if isinstance(stored, str):
        made.narrow = _NARROW.get(stored, 0)
        return stored in _NARROW
    return _set_inner(made, stored)


def _set_inner(made: _Rounding, inner: Quantizer) -> bool:
    """NVFP4's: a float's values over one float32."""
    rule, fmt = inner.scale, inner.format
    told = inner.reciprocal or inner.raw_scale or inner.center or inner.static or inner.floor not in ("", "normal")
    plain = str(inner.granularity) == _ALL and inner.scale_format == "float32" and inner.rounding == "nearest-even"
    if told or not plain or not isinstance(rule, AbsMax) or not isinstance(fmt, Minifloat):
        return False
    made.nested, made.inner, made.inner_target = True, _grid(fmt), rule.target or fmt.absmax
    made.inner_floor = fmt.min_normal if inner.floor else 0.0
    return bool(made.inner.factor)


rounded_inputs.register_kernel("cpu")(rounded)
