"""Exact casts between formats by arithmetic on exponents: a narrow code times ``2^-k`` as a wider float's code.

ZeroQuant-FP (Wu et al. 2023, arXiv:2307.09782) reads FP4 weights so into units for FP8: a table of 16 bytes gives the
wider code for k = 0, and k is subtracted from its exponent field. Below the wider format's normal numbers the hidden
bit is shifted in with the mantissa; a shift that would push a bit out is refused, never rounded.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from nybble.core.errors import FormatError
from nybble.core.shapes import Integer
from nybble.formats import NumberFormat, get_format
from nybble.formats.minifloat import Minifloat
from nybble.ops.rounding import code_dtype, decode_table, encode


@cache
def largest_shift(source: NumberFormat, target: NumberFormat) -> int:
    """The largest k for which ``2^-k`` times any value of ``source`` is one of ``target``.

    E2M1 in E4M3: 8; in E5M2: 15.

    Raises:
        FormatError: ``target`` is no float, or hasn't all values of ``source`` even at k = 0.
    """
    if not isinstance(target, Minifloat):
        raise FormatError(f"{target.name} has no exponent to shift; cast to a float: float8_e4m3fn, float8_e5m2.")
    missing = source.grid[~np.isin(source.grid, target.grid)]
    if len(missing):
        raise FormatError(
            f"{target.name} has not all values of {source.name}: {missing[0]:g} is none of its. Exact casts go to a "
            f"float with its range and at least its mantissa; of E2M1, to float8_e4m3fn or float8_e5m2."
        )
    found = 0
    while np.isin(source.grid / 2.0 ** (found + 1), target.grid).all():
        found += 1
    return found


def shifted_codes(
    codes: Integer[Tensor, "*shape"], shift: Integer[Tensor, "*#shape"], source: NumberFormat, target: NumberFormat
) -> Integer[Tensor, "*shape"]:
    """The codes in ``target`` of ``decode(codes) * 2^-shift``, exactly.

    Args:
        codes: uint8 (int32 above 8 bits), of ``source``.
        shift: integers >= 0 that broadcast against ``codes``. Zeros may have any.
        source: format of ``codes``: any whose values ``target`` has.
        target: a float.

    Returns:
        uint8 (int32 above 8 bits), shape of ``codes``; -0 stays -0 where ``target`` has one.

    Raises:
        FormatError: a shift below 0 or above :func:`largest_shift`; formats without an exact cast; a code that means
            NaN or Inf. Waits for the device.
    """
    limit = largest_shift(source, target)
    assert isinstance(target, Minifloat)
    values = decode_table(source.name, codes.device)
    read = values[codes.int()]
    if not bool(read.isfinite().all()):
        raise FormatError(f"codes of {source.name} that mean NaN or Inf have no exponent to shift.")
    shift = torch.where(read == 0, 0, shift.int())
    if codes.numel() and not 0 <= int(shift.min()) <= int(shift.max()) <= limit:
        raise FormatError(
            f"{source.name} times 2^-k is exact in {target.name} for 0 <= k <= {limit}; the shifts are "
            f"{int(shift.min())} .. {int(shift.max())}. {_way_out(source, int(shift.max()))}."
        )
    wide = encode(values, target.name, "nearest-even").int()[codes.int()]
    hidden, sign = 1 << target.m, wide & (int(target.has_sign) << target.e + target.m)
    field, fraction = wide >> target.m & (1 << target.e) - 1, wide & hidden - 1
    normal = field - shift << target.m | fraction
    significand = torch.where(field > 0, hidden | fraction, fraction)
    subnormal = significand >> (1 - field.clamp(min=1) + shift).clamp(0, 31)  # the hidden bit is shifted in
    result: Tensor = (sign | torch.where(field > shift, normal, subnormal)).to(code_dtype(target))
    return result


def _way_out(source: NumberFormat, shift: int) -> str:
    """Formats that take the shift, if usual ones do, and lines that keep shifts small."""
    names = [name for name in ("float8_e4m3fn", "float8_e5m2", "bfloat16") if _takes(get_format(name), source, shift)]
    wider = f"Take {names[0]}, or let" if names else "Let"
    return f"{wider} fewer scales share one real number: scale_format=(ufloat3_e3m0_finite group=4 floor=normal)"


def _takes(target: NumberFormat, source: NumberFormat, shift: int) -> bool:
    return bool(np.isin(source.grid, target.grid).all()) and largest_shift(source, target) >= shift
